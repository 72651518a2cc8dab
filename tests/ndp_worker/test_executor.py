"""Goal: near-data execution gives each expert's answer on each of its rows, in the order asked.

Method: a store built by hand; outputs against `kernels.reference` on the same codes. cpu_fp32
agrees to 1e-5; cpu_int8 rounds activations to 8 bits per group of 64, twice: 3e-2 relative.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.errors import CorruptRecordError, ExpertUnavailableError
from expert_store.segment import Segment
from expert_store.types import ExpertKey, ExpertTokens, RecordRequest
from ndp_worker.config import NdpConfig
from ndp_worker.executor import Executor
from tests.gpu_worker.sources import CountingSource, LossySource
from tests.hand_store import build_store
from tests.ndp_worker.truth import reference_outputs

TOLERANCE = {"cpu_fp32": 1e-5, "cpu_int8": 3e-2}
HIDDEN = 64


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.float() - truth).norm() / truth.norm())


def work_of(*items: tuple[int, tuple[int, ...]], layer: int = 1) -> list[ExpertTokens]:
    return [ExpertTokens(ExpertKey(layer, expert), rows) for expert, rows in items]


MIXED = work_of((2, (0, 3, 4)), (0, (1,)), (1, (4, 0, 2, 2)))


@pytest.mark.parametrize("backend", ["cpu_fp32", "cpu_int8"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_agrees_with_the_reference(tmp_path: Path, backend: str, bits: int, has_bias: bool) -> None:
    build_store(tmp_path, bits=bits, has_bias=has_bias)
    segment = Segment(tmp_path)
    executor = Executor(segment, num_threads=2, backend=backend)
    hidden_TH = torch.randn(5, HIDDEN)
    for work in (MIXED, work_of((1, (3,))), work_of((0, tuple(range(5))))):
        outputs_PH = executor.run(hidden_TH, work).output_PH
        truth = reference_outputs(segment, hidden_TH, work)
        assert outputs_PH.shape == truth.shape
        assert relative_error(outputs_PH, truth) < TOLERANCE[backend]


FORMS: dict[str, dict[str, Any]] = {
    "symmetric": {"bits": 2, "grids": "symmetric"},
    "mixed": {"bits": (1, 4, 3), "grids": ("symmetric", "affine", "symmetric")},
    "half raw": {"bits": (16, 2, 16)},
    "sz3": {"codec": "sz3"},
    "cuszp": {"codec": "cuszp"},
}


@pytest.mark.parametrize("backend", ["cpu_fp32", "cpu_int8"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_codes_runs(tmp_path: Path, backend: Any, form: str) -> None:
    build_store(tmp_path, **FORMS[form])
    segment = Segment(tmp_path)
    executor = Executor(segment, num_threads=2, backend=backend)
    hidden_TH = torch.randn(5, HIDDEN)
    truth = reference_outputs(segment, hidden_TH, MIXED)
    for _ in range(2):
        outputs_PH = executor.run(hidden_TH, MIXED).output_PH
        assert relative_error(outputs_PH, truth) < TOLERANCE[backend]
    # Views stay; what had to be decoded would fill the memory.
    assert len(executor._experts) == (0 if form == "sz3" else 3)


RESTORED = [
    ExpertTokens(ExpertKey(1, 2), (0, 3, 4), (True, False, True)),
    ExpertTokens(ExpertKey(1, 0), (1, 2)),
    ExpertTokens(ExpertKey(1, 1), (4, 0), (True, True), 2),
]


@pytest.mark.parametrize("backend", ["cpu_fp32", "cpu_int8"])
@pytest.mark.parametrize("blocks", ["gudg", "GUDgud"])  # rank blocks, and planes before them
def test_restored_rows_get_their_blocks(tmp_path: Path, backend: Any, blocks: str) -> None:
    build_store(tmp_path, blocks=blocks)
    segment = Segment(tmp_path)
    source = CountingSource(segment)
    executor = Executor(source, num_threads=2, backend=backend)
    hidden_TH = torch.randn(5, HIDDEN)
    truth = reference_outputs(segment, hidden_TH, RESTORED)
    low_bit = [ExpertTokens(item.key, item.token_rows) for item in RESTORED]
    assert relative_error(reference_outputs(segment, hidden_TH, low_bit), truth) > 0.1
    for _ in range(3):
        outputs = executor.run(hidden_TH, RESTORED)
        assert relative_error(outputs.output_PH, truth) < TOLERANCE[backend]
        assert outputs.degraded == ()
    factors = [r for call in source.calls for r in call if r.kind == "factors"]
    assert [(r.key.expert, r.num_blocks) for r in factors] == [(2, None), (1, 2)], "parsed once"


def test_another_prefix_of_a_compensator_gives_that_prefix(tmp_path: Path) -> None:
    build_store(tmp_path)
    segment = Segment(tmp_path)
    executor = Executor(segment, backend="cpu_fp32")
    hidden_TH = torch.randn(5, HIDDEN)
    for num_blocks in (2, 4, None, 0, 1, 2):
        work = [ExpertTokens(ExpertKey(1, 1), (4, 0), (True, False), num_blocks)]
        outputs_PH = executor.run(hidden_TH, work).output_PH
        truth = reference_outputs(segment, hidden_TH, work)
        assert relative_error(outputs_PH, truth) < 1e-5


def test_an_expert_without_its_factors_runs_from_codes_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = build_store(tmp_path)
    record = manifest.experts[ExpertKey(1, 2)].factors
    assert record is not None
    data = bytearray((tmp_path / record.file).read_bytes())
    data[record.offset] ^= 1
    (tmp_path / record.file).write_bytes(data)
    segment = Segment(tmp_path)
    lost = RecordRequest(ExpertKey(1, 1), "factors", 2)
    executor = Executor(LossySource(segment, [lost]), backend="cpu_fp32")
    hidden_TH = torch.randn(5, HIDDEN)
    low_bit = [ExpertTokens(item.key, item.token_rows) for item in RESTORED]
    for _ in range(2):
        outputs = executor.run(hidden_TH, RESTORED)
        assert outputs.degraded == (0, 2), "one damaged, one lost; the second asked for none"
        truth = reference_outputs(segment, hidden_TH, low_bit)
        assert relative_error(outputs.output_PH, truth) < 1e-5
    told = [message for message in caplog.messages if "codes alone" in message]
    assert len(told) == 2, "one for each expert, not for each call"


def test_blocks_that_no_store_has_are_the_callers_mistake(tmp_path: Path) -> None:
    build_store(tmp_path / "four")
    build_store(tmp_path / "none", blocks="")
    hidden_TH = torch.zeros(5, HIDDEN)
    work = [ExpertTokens(ExpertKey(1, 1), (0,), (True,), 9)]
    with pytest.raises(ValueError, match="num_blocks 9 of layer 1 expert 1, which has 4 blocks"):
        Executor(Segment(tmp_path / "four")).run(hidden_TH, work)
    with pytest.raises(ValueError, match="layer 1 expert 2 has no factors record"):
        Executor(Segment(tmp_path / "none")).run(hidden_TH, RESTORED)


@pytest.mark.parametrize(
    ("restored", "num_blocks"),
    [((True,), None), ((False, False), None), ((), 1), ((True, False), -1), ((), -1)],
)
def test_tokens_with_flags_that_do_not_fit(
    restored: tuple[bool, ...], num_blocks: int | None
) -> None:
    with pytest.raises(ValueError, match="restored of layer 1 expert 0"):
        ExpertTokens(ExpertKey(1, 0), (0, 1), restored, num_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_have_the_callers_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    build_store(tmp_path)
    segment = Segment(tmp_path)
    hidden_TH = torch.randn(5, HIDDEN).to(dtype)
    outputs_PH = Executor(segment, backend="cpu_fp32").run(hidden_TH, MIXED).output_PH
    assert outputs_PH.dtype == dtype
    rounding = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(outputs_PH, reference_outputs(segment, hidden_TH, MIXED)) < rounding


def test_an_unknown_backend(tmp_path: Path) -> None:
    build_store(tmp_path)
    with pytest.raises(ValueError, match="backend"):
        Executor(Segment(tmp_path), backend="nonsense").run(torch.randn(5, HIDDEN), MIXED)


def test_nothing_to_do_and_experts_without_rows(tmp_path: Path) -> None:
    build_store(tmp_path)
    segment = Segment(tmp_path)
    executor = Executor(segment, backend="cpu_fp32")
    hidden_TH = torch.randn(5, HIDDEN)
    assert executor.run(hidden_TH, []).output_PH.shape == (0, HIDDEN)
    assert executor.run(torch.empty(0, HIDDEN), []).output_PH.shape == (0, HIDDEN)
    work = work_of((0, ()), (1, (2,)), (2, ()))
    outputs_PH = executor.run(hidden_TH, work).output_PH
    assert relative_error(outputs_PH, reference_outputs(segment, hidden_TH, work)) < 1e-5


@pytest.mark.parametrize(
    ("hidden_TH", "work", "message"),
    [
        (torch.zeros(5, 32), MIXED, r"expected \[T, 64\]"),
        (torch.zeros(5, HIDDEN, dtype=torch.int32), MIXED, "torch.int32"),
        (torch.zeros(2, HIDDEN), MIXED, "row 3 of 2 hidden states"),
        (torch.zeros(2, HIDDEN), work_of((0, (-1,))), "row -1"),
        (torch.zeros(2, HIDDEN), work_of((9, (0,))), "layer 1 expert 9 is not in store"),
        (torch.zeros(2, HIDDEN), work_of((0, (0,)), layer=8), "layer 8 expert 0 is not in store"),
        (
            torch.zeros(5, HIDDEN),
            [*MIXED, *work_of((0, (0,)), layer=0)],
            r"layers \[0, 1\] in one call",
        ),
    ],
)
def test_the_callers_mistakes(
    tmp_path: Path, hidden_TH: torch.Tensor, work: list[ExpertTokens], message: str
) -> None:
    build_store(tmp_path)
    with pytest.raises(ValueError, match=message):
        Executor(Segment(tmp_path)).run(hidden_TH, work)


def test_a_damaged_and_an_absent_expert(tmp_path: Path) -> None:
    manifest = build_store(tmp_path)
    record = manifest.experts[ExpertKey(1, 0)].codes
    data = bytearray((tmp_path / record.file).read_bytes())
    data[record.offset] ^= 1
    (tmp_path / record.file).write_bytes(data)
    executor = Executor(Segment(tmp_path, [ExpertKey(1, 0), ExpertKey(1, 1)]))
    hidden_TH = torch.randn(2, HIDDEN)
    with pytest.raises(CorruptRecordError, match="layer 1 expert 0"):
        executor.run(hidden_TH, work_of((0, (0,))))
    with pytest.raises(ExpertUnavailableError, match="layer 1 expert 2"):
        executor.run(hidden_TH, work_of((2, (0,))))
    assert executor.run(hidden_TH, work_of((1, (0,)))).output_PH.shape == (1, HIDDEN)


def test_experts_are_views_and_parsed_once(tmp_path: Path) -> None:
    build_store(tmp_path)
    segment = Segment(tmp_path)
    fetched: list[RecordRequest] = []

    class Counting:
        manifest = segment.manifest

        def fetch(self, requests: list[RecordRequest]) -> list[torch.Tensor]:
            fetched.extend(requests)
            return segment.fetch(requests)

    executor = Executor(Counting(), backend="cpu_fp32")
    for _ in range(3):
        executor.run(torch.randn(5, HIDDEN), MIXED)
    assert sorted(request.key.expert for request in fetched) == [0, 1, 2]
    (data,) = segment.fetch([RecordRequest(ExpertKey(1, 2), "codes")])
    mlp = executor._experts[ExpertKey(1, 2)]
    assert mlp.gate.data.data_ptr() == data.data_ptr()


def test_many_threads_get_their_own_answers(tmp_path: Path) -> None:
    build_store(tmp_path)
    segment = Segment(tmp_path)
    executor = Executor(segment, num_threads=2)
    batches = [torch.randn(5, HIDDEN) for _ in range(8)]
    alone = [executor.run(batch, MIXED).output_PH for batch in batches]
    together: list[torch.Tensor | None] = [None] * len(batches)

    def run(index: int) -> None:
        together[index] = executor.run(batches[index], MIXED).output_PH

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, second in zip(alone, together, strict=True):
        assert second is not None
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_threads": 0}, "num_threads: got 0"),
        ({"backend": "gpu"}, "backend: got 'gpu'"),
        ({"max_connections": 0}, "max_connections: got 0"),
        ({"max_message_bytes": -1}, "max_message_bytes: got -1"),
    ],
)
def test_config_names_the_wrong_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NdpConfig(**fields)
    assert NdpConfig().resolve().num_threads >= 1


def test_kept_views_go_when_their_record_is_quarantined_or_repaired(tmp_path: Path) -> None:
    manifest = build_store(tmp_path)
    segment = Segment(tmp_path)
    executor = Executor(segment, backend="cpu_fp32")
    segment.watch(executor.forget)
    hidden_TH, work = torch.randn(5, HIDDEN), work_of((0, (0, 1)))
    before_PH = executor.run(hidden_TH, work).output_PH
    request = RecordRequest(ExpertKey(1, 0), "codes")
    good = segment.fetch([request])[0].clone()
    record = manifest.experts[request.key].codes
    with (tmp_path / record.file).open("r+b") as file:  # the mapped pages change with it
        file.seek(record.offset)
        file.write(bytes([int(good[0]) ^ 1]))
    assert not segment.recheck(request)
    with pytest.raises(CorruptRecordError):
        executor.run(hidden_TH, work)
    segment.repair(request, good)
    assert torch.equal(executor.run(hidden_TH, work).output_PH, before_PH)
