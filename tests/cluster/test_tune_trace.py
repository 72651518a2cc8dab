"""Goal: traces are read as their formats say, made up as asked, and nonsense is refused by name.

Method: small files of each format written by hand, a table of damaged ones, and the statistics of
made-up traces against what was asked for.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from cluster.tune.generate import KINDS, Made, generate
from cluster.tune.trace import Request, Trace
from cluster.tune.trace_files import read_trace

MOONCAKE = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 27482, "input_length": 7322, "output_length": 490, "hash_ids": [0, 2]}
"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
"""
RECORDED = """{"arrival_s": 1700000002.5, "prompt_tokens": 7, "answer_tokens": 3, "ttft_s": 0.5}
{"arrival_s": 1700000001.0, "prompt_tokens": 9, "answer_tokens": 0}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MOONCAKE, [(0.0, 6758, 500), (27.482, 7322, 490)]),
        (AZURE, [(0.0, 4808, 10), (0.052, 3180, 8)]),
        (AZURE_2024, [(0.0, 2162, 5), (0.99007, 2399, 6)]),
        ("\ufeff" + AZURE.replace("\n", "\r\n"), [(0.0, 4808, 10), (0.052, 3180, 8)]),
        (RECORDED, [(0.0, 9, 1), (1.5, 7, 3)]),  # written when they end, so in any order
    ],
)
def test_formats(tmp_path: Path, text: str, expected: list[tuple[float, int, int]]) -> None:
    path = tmp_path / "trace"
    path.write_text(text, newline="")
    got = [(r.arrival_s, r.prompt_tokens, r.answer_tokens) for r in read_trace(path).requests]
    assert got == [(pytest.approx(at, abs=1e-6), prompt, answer) for at, prompt, answer in expected]


def test_a_folder_is_what_several_servers_recorded(tmp_path: Path) -> None:
    (tmp_path / "requests-a.jsonl").write_text(RECORDED)
    (tmp_path / "requests-b.jsonl").write_text(RECORDED.replace("17000000", "16999999"))
    trace = read_trace(tmp_path)
    assert len(trace.requests) == 4
    assert trace.end_s == pytest.approx(101.5)
    with pytest.raises(ValueError, match=r"no file requests-\*\.jsonl"):
        read_trace(tmp_path / "..")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty, expected a request in each line"),
        ("\n\n", "empty, expected a request in each line"),
        ("when,how\n1,2\n", "unknown format, its first line is 'when,how'"),
        ('{"time": 3}\n', "unknown format"),
        ("{oops\n", ":1: not JSON"),
        (MOONCAKE + "[1]\n", ":3: got .* expected an object"),
        (MOONCAKE + '{"timestamp": 1e6}\n', ":3: no field 'output_length'"),
        (MOONCAKE.replace("27482", "-5"), r":2: got the time -0\.005"),
        (MOONCAKE.replace("27482", "NaN"), ":2: got the time nan"),
        (MOONCAKE.replace("7322", "0"), ":2: prompt_tokens: got 0, expected 1 to"),
        (MOONCAKE.replace("7322", "7.5"), r":2: got 7\.5, expected a whole number"),
        (MOONCAKE.replace("7322", '"many"'), ":2: could not convert"),
        (MOONCAKE + MOONCAKE.splitlines()[0].replace(" 0,", " 5,"), "sort the trace by time"),
        ("".join(reversed(MOONCAKE.splitlines(True))), "request 2 came before the first"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "the trace has no request"),
        (AZURE + "yesterday,1,2\n", ":4: Invalid isoformat string"),
        (AZURE + "2023-11-16 18:17:05\n", ":4: "),
    ],
)
def test_hostile_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path)


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\xff\xfe\x00\x81" * 9)
    with pytest.raises(ValueError, match="not a text file"):
        read_trace(path)


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_traces_are_as_asked(kind: str) -> None:
    made = Made(kind, seconds=3600, rate_per_s=4, prompt_tokens=200, answer_tokens=50, seed=3)
    trace = generate(made)
    assert trace == generate(made)
    assert trace.requests != generate(Made(kind, 3600, 4, 200, 50, seed=4)).requests
    # Bursts come at random: a quarter of an hour more or less of them changes the mean.
    assert len(trace.requests) == pytest.approx(4 * 3600, rel=0.15)
    assert trace.mean_prompt_tokens == pytest.approx(200, rel=0.05)
    assert trace.mean_answer_tokens == pytest.approx(50, rel=0.05)
    assert trace.end_s <= 3600


def test_rates_have_the_shape_of_their_name() -> None:
    def per_part(kind: str, parts: int) -> list[int]:
        requests = generate(Made(kind, 3000, 4, seed=1)).requests
        return [sum(int(r.arrival_s * parts / 3000) == n for r in requests) for n in range(parts)]

    low, high, low_again = per_part("step", 3)
    assert high / low == pytest.approx(4, rel=0.15)
    assert high / low_again == pytest.approx(4, rel=0.15)
    waves = per_part("diurnal", 4)
    assert max(waves) < 1.2 * min(waves)
    eighths = per_part("diurnal", 8)
    assert eighths[1] > 2 * eighths[0]
    flat, bursty = per_part("poisson", 60), per_part("bursts", 60)
    assert statistics.pstdev(bursty) > 3 * statistics.pstdev(flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "weekly"}, "kind: got 'weekly', expected one of poisson"),
        ({"seconds": 0}, "seconds: got 0"),
        ({"rate_per_s": float("nan")}, "rate_per_s: got nan"),
        ({"rate_per_s": 9e3, "seconds": 9e4}, "is too much"),
        ({"prompt_tokens": 0}, "prompt_tokens: got 0"),
    ],
)
def test_nonsense_is_not_made(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Made(**{"kind": "poisson", **change})


def test_halves_and_rates() -> None:
    trace = Trace("t", tuple(Request(float(n), 1, 1) for n in range(10)))
    early, late = trace.halves()
    assert [r.arrival_s for r in early.requests] == [0, 1, 2, 3, 4]
    assert [r.arrival_s for r in late.requests] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert trace.scaled(rate=3).end_s == 3
    with pytest.raises(ValueError, match="give a longer trace"):
        Trace("t", (Request(0.0, 1, 1),)).halves()
    for rate in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="rate: got"):
            trace.scaled(rate=rate)
    with pytest.raises(ValueError, match="the trace has no request"):
        Trace("t", ())
    with pytest.raises(ValueError, match="sort the trace by time"):
        Trace("t", (Request(2.0, 1, 1), Request(1.0, 1, 1)))
