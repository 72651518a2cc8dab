"""Rows of the comparison, and the page that puts ours beside each rival."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu_kernels.contestant import Contestant, Form, Shape
from benchmarks.cpu_kernels.ggml_library import library
from benchmarks.cpu_kernels.rounds import Times
from benchmarks.record import commit, processor, provenance, table, today, write_rows
from kernels import cpu_native

OURS = "moetier"
HEAD = """# CPU kernels beside what a user would pick instead

One thread; every contestant's weights lie in several copies, and between two uses of a copy far
more is read than a cache holds. Contestants take turns round by round and the limits, read
bandwidth and u8 x s8 dot products out of registers, are measured in the same rounds. The gate ran
first: each answer is within its tolerance of float32 products with its own dequantised weights.
`expert` is down(silu(gate x) * up x), `matrix` is gate x alone. ggml and ONNX Runtime run an
expert as one graph, torch's int4 has no fused form and is three products. Where the inputs are no
multiple of 256 ggml's K-quants fall back as llama.cpp does, which the name says.
Made by `python -m benchmarks.cpu_kernels`; every row is in [{csv}]({csv}).
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the CSV. Bytes are those of the weights read per call."""

    what: str
    form: Form
    shape: str
    tokens: int
    bits: int
    num_bytes: int
    p20_us: float
    p50_us: float
    p80_us: float
    gb_per_s: float
    share_of_read_bandwidth: float
    share_of_dot_peak: float
    times_faster_than: str  # "RIVAL RATIO; ...": for ours, medians of the rounds' own ratios
    rounds: int
    threads: int
    read_gb_per_s: float
    dot_peak_g_per_s: float
    hardware: str
    load: str  # 1-minute load average over cores: others shared the machine
    commit: str
    date: str


def rows_of(
    shape: Shape, form: Form, num_tokens: int, contestants: list[Contestant], times: Times
) -> list[Row]:
    rivals = [each.name for each in contestants if not each.name.startswith(OURS)]
    load = f"{os.getloadavg()[0]:.1f}/{os.cpu_count()}"
    rows = []
    for each in contestants:
        p20, p50, p80 = times.quantiles(each.name)
        beaten = rivals if each.name.startswith(OURS) else []
        rows.append(
            Row(
                what=each.name,
                form=form,
                shape=str(shape),
                tokens=num_tokens,
                bits=each.bits,
                num_bytes=each.num_bytes,
                p20_us=round(p20 * 1e6, 1),
                p50_us=round(p50 * 1e6, 1),
                p80_us=round(p80 * 1e6, 1),
                gb_per_s=round(each.num_bytes / p50 / 1e9, 2),
                share_of_read_bandwidth=round(each.num_bytes / p50 / times.read_bandwidth, 3),
                share_of_dot_peak=round(
                    num_tokens * shape.products(form) / p50 / times.dot_peak, 3
                ),
                times_faster_than="; ".join(
                    f"{rival} {times.ratio(each.name, rival):.2f}" for rival in beaten
                ),
                rounds=len(times.seconds[each.name]),
                threads=1,
                read_gb_per_s=round(times.read_bandwidth / 1e9, 1),
                dot_peak_g_per_s=round(times.dot_peak / 1e9),
                hardware=f"{processor()}, {cpu_native.best_isa()}",
                load=load,
                commit=commit(),
                date=today(),
            )
        )
    return rows


def print_row(row: Row) -> None:
    print(
        f"{row.what:36} {row.p20_us:9.1f} {row.p50_us:9.1f} {row.p80_us:9.1f} us"
        f" {row.share_of_read_bandwidth:6.0%} of read bandwidth"
        f" {row.share_of_dot_peak:6.0%} of dot peak"
    )
    if row.times_faster_than:
        print(f"    times faster than {row.times_faster_than}")


def write_report(out: Path, rows: list[Row]) -> None:
    """OUT.csv and OUT.md."""
    write_rows(out.with_suffix(".csv"), rows)
    ggml = library()
    built = f"ggml was built for {ggml.isa()}." if ggml else "llama-cpp-python is not installed."
    loads = sorted((row.load for row in rows), key=lambda load: float(load.partition("/")[0]))
    shared = f"Load average over cores while it ran: {loads[0]} to {loads[-1]}."
    parts = [HEAD.format(csv=out.with_suffix(".csv").name), f"{provenance()} {built} {shared}"]
    for shape, form in dict.fromkeys((row.shape, row.form) for row in rows):
        here = [row for row in rows if (row.shape, row.form) == (shape, form)]
        parts += [f"\n## {shape}, {form}\n", _own_table(here), "", _rival_table(here)]
    out.with_suffix(".md").write_text("\n".join(parts) + "\n")
    print(f"wrote {out}.csv and {out}.md")


def _own_table(rows: list[Row]) -> str:
    """Ours: time, shares, and the times faster than each rival of the same width."""
    width_of = {row.what: row.bits for row in rows}
    head = ("ours", "tokens", "p50 us", "of read bandwidth", "of dot peak", "times faster than")
    return table(
        head,
        (
            (
                row.what.removeprefix(f"{OURS} "),
                str(row.tokens),
                f"{row.p50_us:.0f}",
                f"{row.share_of_read_bandwidth:.0%}",
                f"{row.share_of_dot_peak:.0%}",
                ", ".join(_of_width(row, width_of)) or "-",
            )
            for row in rows
            if row.what.startswith(OURS)
        ),
    )


def _of_width(row: Row, width_of: dict[str, int]) -> list[str]:
    ratios = [each.rpartition(" ") for each in row.times_faster_than.split("; ") if each]
    return [f"{rival} {ratio}" for rival, _, ratio in ratios if width_of[rival] == row.bits]


def _rival_table(rows: list[Row]) -> str:
    """Theirs: p50 at each token count."""
    counts = sorted({row.tokens for row in rows})
    rivals = dict.fromkeys(row.what for row in rows if not row.what.startswith(OURS))
    time_of = {(row.what, row.tokens): row.p50_us for row in rows}
    head = ("theirs, p50 us", *(f"{count} tokens" for count in counts))
    return table(
        head,
        ((rival, *(f"{time_of[rival, count]:.0f}" for count in counts)) for rival in rivals),
    )
