"""Peak memory of compressing a checkpoint, against the bytes of its experts.

Each size is compressed in a process of its own, after a tiny checkpoint that loads the libraries
and starts the threads; what its peak rises by is the figure. `python -m benchmarks.memory` writes
a table; tests/expert_store/test_memory.py holds two of the sizes to a bound.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.record import RESULTS, provenance
from expert_store.families import meta_model
from expert_store.files import Disk, layout
from tests.tiny_checkpoints import tiny_config, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
REPORT = RESULTS / "compress-memory.md"
SIZES = ((2, 48, 384), (4, 64, 640), (8, 64, 1024))
"""layers, experts per layer, hidden = ffn: 81, 600 and 3072 MiB of bfloat16 experts."""
MIB = 1 << 20
SCRIPT = """
import resource, sys
from pathlib import Path
from expert_store.compress import compress
from expert_store.config import CompressionConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tiny, large, target, recipe = sys.argv[1:]
compress(Path(tiny), Path(target) / "tiny", CompressionConfig(recipe="paper"), jobs=2)
before = peak()
compress(Path(large), Path(target) / "large", CompressionConfig(recipe=recipe), jobs=2)
print(peak() - before)
"""


def write_large_checkpoint(folder: Path, *, layers: int, experts: int, size: int) -> int:
    """An olmoe checkpoint of random bf16 experts of [size, size]; returns its bytes of experts."""
    config = tiny_config("olmoe", layers=layers, hidden=size, ffn=size, experts=experts)
    shapes: dict[str, tuple[int, ...]] = {
        name: tuple(value.shape)
        for name, value in meta_model(config).state_dict().items()
        if ".experts." not in name
    }
    for layer in range(layers):
        for expert in range(experts):
            for name in ("gate", "up", "down"):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
                shapes[key] = (size, size)
    tensors = [(n, "BF16", s, 2 * int(torch.Size(s).numel())) for n, s in shapes.items()]
    header, entries = layout(tensors, {"format": "pt"})
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(max(e.num_bytes for e in entries), generator=generator)

    def chunks() -> Iterator[bytes]:
        yield header
        for i, entry in enumerate(entries):
            values = noise.roll(97 * i)[: entry.num_bytes // 2].bfloat16()
            yield values.view(torch.uint8).numpy().tobytes()

    total = len(header) + sum(entry.num_bytes for entry in entries)
    Disk().write_atomic(folder / "model.safetensors", total, chunks())
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(folder)
    return 3 * 2 * size * size * layers * experts


def peak_growth(tmp_path: Path, large: Path, recipe: str) -> int:
    tiny = write_tiny_checkpoint("olmoe", tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny), str(large), str(tmp_path / "out"), recipe],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def main() -> int:
    lines = [
        "# Peak memory of compressing",
        "",
        provenance(),
        "",
        "Growth of the process' peak resident memory over a run that had compressed a tiny",
        "checkpoint before (libraries and threads are in that baseline). Random bf16 experts in",
        "olmoe's layout, jobs=2. Recipe original copies the experts: nothing hides the reading.",
        "",
        "| experts, MiB | experts | one expert in float32, MiB | recipe | growth, MiB | share |",
        "|---|---|---|---|---|---|",
    ]
    for layers, experts, size in SIZES:
        recipes = ("paper", "original") if size < 1024 else ("original",)
        for recipe in recipes:
            with tempfile.TemporaryDirectory(prefix="moetier-memory-") as name:
                folder = Path(name)
                large = folder / "large"
                num_bytes = write_large_checkpoint(large, layers=layers, experts=experts, size=size)
                growth = peak_growth(folder, large, recipe)
            lines.append(
                f"| {num_bytes / MIB:.0f} | {layers * experts} | {12 * size * size / MIB:.1f} "
                f"| {recipe} | {growth / MIB:.0f} | {growth / num_bytes:.0%} |"
            )
            print(lines[-1], flush=True)
    REPORT.write_text("\n".join(lines) + "\n")
    print(f"wrote {REPORT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
