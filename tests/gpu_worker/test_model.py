"""Goal: transformers loads a store as an ordinary model without its experts, which then run from
wherever they are bound; nothing of an expert is ever allocated.

Method: a tiny compressed store; and, for memory, a store whose experts would take gigabytes, loaded
in a process of its own whose peak memory is read.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gpu_worker.model
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.errors import ExpertUnavailableError, StoreFormatError
from expert_store.families import experts_modules, meta_model
from expert_store.segment import Segment
from expert_store.types import ExpertKey, RecordRequest
from gpu_worker.config import WorkerConfig
from gpu_worker.experts import ExpertsFailed, StoreExperts
from gpu_worker.model import ModelRunner, bind_experts, load_model, register
from tests.gpu_worker.sources import InProcessNearData, LossySource, ShuffledSource
from tests.tiny_checkpoints import tiny_config, write_tiny_checkpoint

CONFIG = WorkerConfig(device="cpu", dtype="float32")
NEAR_DATA_TOLERANCE = 2e-2
"""Relative RMS of logits. int8 activations cost 1-2e-2 per MLP; 1.2e-2 was measured here."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    # deepseek_v2: its first layer is dense, so layer numbers are not those of the experts modules.
    model = write_tiny_checkpoint("deepseek_v2", folder / "model", hidden=128, ffn=128, layers=3)
    compress(model, folder / "store", CompressionConfig(recipe="paper"), jobs=1)
    return folder / "store"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = write_tiny_checkpoint("mixtral", folder / "model", hidden=128, ffn=128)
    compress(model, folder / "store", CompressionConfig(recipe="paper"), jobs=1)
    return folder / "store"


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "store"))


class Runners:
    """Makes runners and closes their experts."""

    def __init__(self) -> None:
        self._open: list[StoreExperts] = []

    def experts(self, source: Any, config: WorkerConfig = CONFIG, near: Any = None) -> StoreExperts:
        self._open.append(StoreExperts(source, config.resolve(source.manifest), near))
        return self._open[-1]

    def __call__(self, store: Path, source: Any = None) -> ModelRunner:
        source = source or Segment(store)
        config = CONFIG.resolve(source.manifest)
        return load_model(store, source.manifest, config, self.experts(source))

    def close(self) -> None:
        for experts in self._open:
            experts.check_integrity()
            experts.close()


@pytest.fixture
def runners() -> Iterator[Runners]:
    made = Runners()
    yield made
    made.close()


def forward(runner: ModelRunner, ids: torch.Tensor, **options: Any) -> Any:
    return runner.forward(ids, torch.arange(ids.shape[1]).expand_as(ids), None, None, **options)


IDS = torch.arange(24).reshape(2, 12) + 3


def test_experts_have_no_parameters_and_know_their_decoder_layer(
    store: Path, runners: Runners
) -> None:
    runner = runners(store)
    modules = experts_modules(runner.model)
    assert [module.moetier_layer for _, module in modules.values()] == [1, 2]
    assert not any(list(module.parameters()) for _, module in modules.values())
    assert not any(parameter.is_meta for parameter in runner.model.parameters())
    assert not runner.model.training


def test_plain_from_pretrained_works_and_runs_once_experts_are_bound(
    store: Path, runners: Runners
) -> None:
    """No call of ours but the import and `bind_experts`; transformers' own generate on top."""
    model = AutoModelForCausalLM.from_pretrained(
        store, experts_implementation="moetier", dtype=torch.float32
    )
    with pytest.raises(ValueError, match="no StepExperts is bound to it; call gpu_worker.model.b"):
        model(input_ids=IDS)
    bind_experts(model, runners.experts(Segment(store)))
    tokens = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=True)
    assert tokens.shape == (1, IDS.shape[1] + 4)
    logits = model(input_ids=IDS).logits
    assert torch.equal(logits, forward(runners(store), IDS).logits)


def test_registering_again_changes_nothing(store: Path, runners: Runners) -> None:
    register()
    importlib.reload(gpu_worker.model)
    assert forward(runners(store), IDS).logits.shape == (2, 12, 128)


def test_logits_to_keep_gives_the_same_logits_of_fewer_positions(
    store: Path, runners: Runners
) -> None:
    runner = runners(store)
    every = forward(runner, IDS).logits
    last = forward(runner, IDS, logits_to_keep=1).logits
    assert last.shape == (2, 1, 128)
    torch.testing.assert_close(last, every[:, -1:], rtol=1e-5, atol=1e-6)


def test_counters_of_a_step_add_up(store: Path, runners: Runners) -> None:
    runner = runners(store)
    first = forward(runner, IDS).counters
    second = forward(runner, IDS).counters
    num_pairs = IDS.numel() * 2 * 2  # top-2, two MoE layers
    assert first.restored_pairs + first.low_bit_pairs + first.degraded_pairs == num_pairs
    assert first.total_moved_bytes == sum(first.planned_bytes.values()) > 0
    # All of it fits the cache, so the same step again moves nothing.
    assert second.total_moved_bytes == 0
    assert sum(second.cache_hits.values()) == sum(first.cache_misses.values())


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_copies_land_changes_no_bit_of_the_logits(
    mixtral: Path, runners: Runners, seed: int
) -> None:
    expected = forward(runners(mixtral), IDS).logits
    source = ShuffledSource(Segment(mixtral), seed)
    config = replace(CONFIG, cache_bytes=0, fetch_bytes=1, fetch_threads=4)
    experts = runners.experts(source, config)
    source.attach(experts.streamer)
    runner = load_model(mixtral, source.manifest, config.resolve(source.manifest), experts)
    assert torch.equal(forward(runner, IDS).logits, expected)
    assert len(source.landed) > 4


def test_near_data_agrees_within_the_tolerance_of_int8_activations(
    mixtral: Path, runners: Runners
) -> None:
    segment = Segment(mixtral)
    off = forward(runners(mixtral), IDS)
    config = replace(CONFIG, near_data="low_bit")
    experts = runners.experts(segment, config, InProcessNearData(segment))
    runner = load_model(mixtral, segment.manifest, config.resolve(segment.manifest), experts)
    on = forward(runner, IDS)
    error = float((on.logits - off.logits).norm() / off.logits.norm())
    assert 0 < error < NEAR_DATA_TOLERANCE
    assert on.counters.near_data_pairs == off.counters.low_bit_pairs > 0
    assert on.counters.restored_pairs == off.counters.restored_pairs


def test_padding_neither_moves_bytes_nor_changes_the_others(
    mixtral: Path, runners: Runners
) -> None:
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 5:] = False
    whole = forward(runners(mixtral), IDS)
    part = forward(runners(mixtral), IDS, valid_BT=valid)
    torch.testing.assert_close(part.logits[0], whole.logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.logits[1, :5], whole.logits[1, :5], rtol=1e-4, atol=1e-5)
    pairs = part.counters.restored_pairs + part.counters.low_bit_pairs
    assert pairs == int(valid.sum()) * 2 * 2


def test_degraded_pairs_are_told_per_sequence(mixtral: Path, runners: Runners) -> None:
    """All factors lost: every sequence loses its Top-1 pairs that have factors."""
    inner = Segment(mixtral)
    infos = inner.manifest.experts
    lost = [RecordRequest(key, "factors") for key, info in infos.items() if info.factors]
    output = forward(runners(mixtral, LossySource(inner, lost)), IDS)
    intact = forward(runners(mixtral, inner), IDS)
    assert sum(output.degraded_pairs) == intact.counters.restored_pairs > 0
    assert all(pairs > 0 for pairs in output.degraded_pairs)
    assert intact.degraded_pairs == (0, 0)
    assert output.counters.restored_pairs == 0


def test_a_lost_expert_names_rows_of_the_flattened_batch(mixtral: Path, runners: Runners) -> None:
    inner = Segment(mixtral)
    seen: dict[int, set[int]] = {}
    for expert in range(4):
        source = LossySource(inner, [RecordRequest(ExpertKey(0, expert), "codes")])
        lossy = runners(mixtral, source)
        with pytest.raises(ExpertsFailed) as caught:
            forward(lossy, IDS)
        assert isinstance(caught.value.cause, ExpertUnavailableError)
        seen[expert] = set(caught.value.token_rows)
    assert all(rows <= set(range(IDS.numel())) for rows in seen.values())
    # top-2 routing: each of the 24 rows needs two experts of layer 0.
    assert sum(len(rows) for rows in seen.values()) == 2 * IDS.numel()


def test_a_missing_dense_tensor_is_named(copied: Path, runners: Runners) -> None:
    (file,) = copied.glob("dense*.safetensors")
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("q_a_proj.weight"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StoreFormatError, match=f"lack 1 tensors.*the first is {name}"):
        runners(copied)


def test_a_truncated_dense_file_is_a_store_error(copied: Path, runners: Runners) -> None:
    (file,) = copied.glob("dense*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StoreFormatError, match="cannot be read.*run `moetier verify"):
        runners(copied)


def test_a_manifest_of_another_model_is_refused(store: Path, runners: Runners) -> None:
    segment = Segment(store)
    manifest = segment.manifest
    other = replace(manifest, model=replace(manifest.model, moe_layers={7: "elsewhere"}))
    with pytest.raises(StoreFormatError, match="do not describe the same MoE layers"):
        load_model(store, other, CONFIG.resolve(manifest), runners.experts(segment))


_LOAD_AND_MEASURE = r"""
import re, sys, torch
from pathlib import Path
import gpu_worker.model
from transformers import AutoModelForCausalLM
# VmHWM is this process's own; ru_maxrss would begin with the parent's.
peak = lambda: 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = peak()
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], experts_implementation="moetier", dtype=torch.float32
)
print(before, peak(), sum(parameter.numel() for parameter in model.parameters()))
"""


def test_experts_are_never_allocated(tmp_path: Path) -> None:
    """3.2 GB of experts in the config, none in the files: loading grows by less than a tenth."""
    config = tiny_config("mixtral", hidden=512, ffn=2048, experts=64, layers=4)
    skeleton = meta_model(config)
    experts = sum(
        parameter.numel()
        for _, module in experts_modules(skeleton).values()
        for parameter in module.parameters()
    )
    dense = {
        # The hub's Mixtral layout, as a store has it.
        name.replace(".mlp.", ".block_sparse_moe."): torch.zeros(tensor.shape)
        for name, tensor in skeleton.state_dict().items()
        if ".experts." not in name
    }
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quantization_config": {"quant_method": "moetier"}}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | quantization))
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_AND_MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after, loaded = map(int, done.stdout.split()[-3:])
    assert experts * 4 > 3e9
    assert loaded == sum(tensor.numel() for tensor in dense.values())
    assert after - before > sum(tensor.nbytes for tensor in dense.values()) / 2  # it does measure
    assert after - before < experts * 4 / 10, f"grew by {(after - before) / 1e6:.0f} MB"
