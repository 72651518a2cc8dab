"""Last step: the decode kernel beside gemlite, which is HQQ's own Triton path, at the same bits.

gemlite is no dependency: `pip install --no-deps --target .moetier/gpu-peers gemlite tqdm` puts it
where this step looks, and that folder is carried along. It has 2 and 4 bits, no 3. Both multiply
the same codes, scales and zeros; gemlite takes float16 inputs, ours the digits of float32 ones,
whose making is not timed. It tunes itself on the first call of a shape, before the rounds.

Legend: T tokens, N rows, K cols, G groups.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import torch

from benchmarks.gpu.bandwidth import decode_all
from benchmarks.gpu.clock import as_graph, in_turns
from benchmarks.gpu.matrices import copies, form_name, random_inputs, random_matrix, relative_rms
from benchmarks.gpu.recorder import Recorder, quantiles
from benchmarks.gpu.setting import ROOT, Setting
from kernels import reference
from kernels.packing import unpack
from kernels.types import GROUP_SIZE, QuantizedMatrix

FOLDER = ROOT / ".moetier" / "gpu-peers"
SHAPES = ((14336, 4096), (4096, 14336), (1408, 2048))
BITS = (2, 4)
TOKENS = (1, 4, 8)
POOL_BYTES = 256 << 20
ROUNDS = 20
TOLERANCE = 1e-2
"""Float16 inputs and results; what fails this is another product than ours."""
NOT_HERE = "gemlite cannot be imported here, so not run; see benchmarks/results/gpu/README.md"
Linear = Callable[[torch.Tensor], torch.Tensor]


def run(setting: Setting, recorder: Recorder) -> None:
    gemlite = None if setting.tiny else _gemlite()
    if gemlite is None:
        recorder.note(NOT_HERE)
        return
    recorder.note(
        f"gemlite {getattr(gemlite, '__version__', 'of unknown version')}; ours is the decode "
        "kernel alone: the launch that makes digits of a layer's inputs is not timed, steps have it"
    )
    with torch.inference_mode():
        for rows, cols in SHAPES:
            for bits in BITS:
                try:
                    _measure(setting, recorder, gemlite, rows, cols, bits)
                except Exception as error:  # noqa: BLE001 - a peer's fault is told, not ours
                    told = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                    recorder.note(f"{rows} x {cols}, {bits} bits: gemlite did not run: {told}")


def _gemlite() -> ModuleType | None:
    if FOLDER.is_dir():
        sys.path.append(str(FOLDER))
    try:
        return importlib.import_module("gemlite")
    except ImportError:  # absent, or without what it needs
        return None


def as_gemlite(gemlite: ModuleType, matrix: QuantizedMatrix) -> Linear:
    """The same weight as gemlite packs it; scales and zeros rounded to float16, like ours."""
    codes_NK, scale_NG, zero_scaled_NG = unpack(matrix)
    half = gemlite.DType.FP16
    linear = gemlite.GemLiteLinear(
        matrix.bits, group_size=GROUP_SIZE, in_features=matrix.cols, out_features=matrix.rows,
        input_dtype=half, output_dtype=half, scaled_activations=False,
    )  # fmt: skip
    zero_NG = zero_scaled_NG / scale_NG.clamp(min=1e-8)
    linear.pack(codes_NK.contiguous(), scale_NG.half(), zero_NG.half(), None)
    return linear


def _measure(
    setting: Setting, recorder: Recorder, gemlite: ModuleType, rows: int, cols: int, bits: int
) -> None:
    device, form = setting.device, form_name(bits, "affine")
    pool = copies(random_matrix(rows, cols, bits, device), POOL_BYTES)
    theirs = [as_gemlite(gemlite, matrix) for matrix in pool]
    weight_NK = reference.dequantize(pool[0])
    for num_tokens in TOKENS:
        x = random_inputs(num_tokens, cols, device)
        x_half = x.half()
        error = relative_rms(theirs[0](x_half), x_half.float() @ weight_NK.T)
        if not error < TOLERANCE:
            recorder.note(f"{rows} x {cols}, {form}: gemlite's result differs by {error:.2g}")
            return
        work = {
            "gemlite": as_graph(lambda x=x_half: [linear(x) for linear in theirs], device)[0],
            "ours": as_graph(decode_all(pool, x), device)[0],
        }
        times = in_turns(work, device=device, rounds=setting.rounds(ROUNDS))
        _rows(recorder, times, pool, num_tokens)


def _rows(
    recorder: Recorder,
    times: dict[str, list[float]],
    pool: list[QuantizedMatrix],
    num_tokens: int,
) -> None:
    matrix, each = pool[0], {name: [s / len(pool) for s in times[name]] for name in times}
    form, shape = form_name(matrix.bits, matrix.grid), f"{matrix.rows} x {matrix.cols}"
    weights = matrix.rows * matrix.cols / 1e9
    for name in ("gemlite", "ours"):
        recorder.row(
            f"decode beside gemlite, {name}, {form}", each[name], shape=shape, tokens=num_tokens,
            gates=(f"decode {form}",), rate_of_s=weights, rate_unit="Gweights/s",
        )  # fmt: skip
    faster = quantiles(each["gemlite"])[1] / quantiles(each["ours"])[1]
    recorder.value(
        f"decode {form}: faster than gemlite", faster, "times", shape=shape, tokens=num_tokens,
        gates=(f"decode {form}",),
    )  # fmt: skip
