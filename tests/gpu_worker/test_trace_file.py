"""Goal: a trace's bytes are what the spec says, come back as they went, and no damaged file passes.

Method: golden bytes of a small trace, a round trip of random ones, and a table of malformed files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from expert_store.errors import StoreFormatError
from gpu_worker.trace import LayerRows, StepTrace, TracedModel
from gpu_worker.trace_file import load_trace, save_trace


def make_trace(seed: int = 0, steps: tuple[int, ...] = (2, 1)) -> StepTrace:
    generator = torch.Generator().manual_seed(seed)
    model = TracedModel("hand", "mixtral", 2, {3: 4, 1: 300})
    layers = {}
    for layer, count in model.num_experts.items():
        shape = (sum(steps), 2)
        run_SK = torch.rand(shape, generator=generator) < 0.8
        layers[layer] = LayerRows(
            torch.randint(count, shape, generator=generator).to(torch.int16),
            torch.rand(shape, generator=generator),
            run_SK,
            run_SK & (torch.rand(shape, generator=generator) < 0.5),
        )
    return StepTrace(model, "ab" * 32, "by hand, ünïcode", steps, layers)


def same(left: StepTrace, right: StepTrace) -> bool:
    told = ("model", "store_version", "origin", "rows_per_step")
    return (
        all(getattr(left, name) == getattr(right, name) for name in told)
        and list(left.layers) == list(right.layers)
        and all(
            torch.equal(getattr(rows, name), getattr(right.layers[layer], name))
            and getattr(rows, name).dtype == getattr(right.layers[layer], name).dtype
            for layer, rows in left.layers.items()
            for name in rows.__slots__
        )
    )


def test_the_bytes_are_those_of_the_spec(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    save_trace(path, make_trace())
    found = load_file(path)
    assert json.loads(found["about"].numpy().tobytes()) == {
        "format": "moetier-trace",
        "format_version": 1,
        "model": {"name": "hand", "model_type": "mixtral", "top_k": 2},
        "layers": [{"layer": 3, "num_experts": 4}, {"layer": 1, "num_experts": 300}],
        "store_version": "ab" * 32,
        "origin": "by hand, ünïcode",
    }
    assert found["steps"].tolist() == [2, 1]
    assert found["steps"].dtype == torch.int32
    rows = make_trace().layers[1]
    assert torch.equal(found["layer-00001.ids"], rows.topk_ids_SK)
    assert torch.equal(found["layer-00001.weights"], rows.topk_weights_SK)
    assert torch.equal(found["layer-00001.flags"], rows.run_SK + 2 * rows.restore_SK)
    assert len(found) == 8
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN


GOLDEN = "9bd19046514be57f91bd09513e707fae36869bf0148cad722a0e57bb27cca129"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_what_was_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: list[int]
) -> None:
    path = tmp_path_factory.mktemp("traces") / "a.trace"
    trace = make_trace(seed, tuple(steps))
    save_trace(path, trace)
    assert same(load_trace(path), trace)
    assert list(path.parent.iterdir()) == [path], "nothing temporary is left"


def about(**changes: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        told = json.loads(tensors["about"].numpy().tobytes())
        told.update({name: value for name, value in changes.items() if value is not ...})
        for name, value in changes.items():
            if value is ...:
                del told[name]
        tensors["about"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)

    return change


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


IDS = "layer-00003.ids"
MALFORMED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no about": (lambda t: t.pop("about"), "no tensor 'about'.*this is no trace"),
    "about of another type": (put("about", torch.zeros(4)), "'about': expected U8, got F32"),
    "about too large": (put("about", torch.zeros(1 << 21, dtype=torch.uint8)), "at most 1048576"),
    "no JSON": (put("about", torch.zeros(9, dtype=torch.uint8)), "not valid JSON"),
    "another format": (about(format="x"), "format: expected 'moetier-trace', got 'x'"),
    "a newer version": (about(format_version=2), "format_version: expected 1 .*got 2"),
    "a field too many": (about(extra=1), "unknown field 'extra'"),
    "a field too few": (about(origin=...), "field 'origin' is missing"),
    "no version of the store": (about(store_version="x"), "store_version: expected text matching"),
    "no layers": (about(layers=[]), "layers: expected different layers, 1 at least"),
    "a layer twice": (about(layers=[{"layer": 3, "num_experts": 4}] * 2), "different layers"),
    "too many experts": (about(layers=[{"layer": 3, "num_experts": 1 << 16}]), "1 to 32768"),
    "a layer too few": (about(layers=[{"layer": 3, "num_experts": 4}]), "'layer-00001.flags'"),
    "no steps": (put("steps", torch.zeros(0, dtype=torch.int32)), "steps: expected 1 to"),
    "an empty step": (put("steps", torch.tensor([3, 0], dtype=torch.int32)), "of 1 row or more"),
    "steps of another type": (put("steps", torch.ones(3)), "'steps': expected I32, got F32"),
    "too many rows": (
        put("steps", torch.full((2,), 1 << 30, dtype=torch.int32)),
        "at most 67108864 rows, got 2147483648",
    ),
    "fewer rows than steps say": (
        put("steps", torch.tensor([4], dtype=torch.int32)),
        r"'layer-00003.ids': expected I16 \[4, 2\], got I16 \[3, 2\]",
    ),
    "no ids": (lambda t: t.pop(IDS), "'layer-00003.ids': expected I16 .*got none"),
    "an expert that is not": (put(IDS, torch.full((3, 2), 4, dtype=torch.int16)), "experts 4 to 4"),
    "a negative expert": (put(IDS, torch.full((3, 2), -1, dtype=torch.int16)), "experts -1 to -1"),
    "NaN": (put("layer-00001.weights", torch.full((3, 2), torch.nan)), "weights: hold NaN or Inf"),
    "an unknown flag": (
        put("layer-00001.flags", torch.full((3, 2), 5, dtype=torch.uint8)),
        "flagged other than 0, 1, 3",
    ),
    "restored and not run": (
        put("layer-00001.flags", torch.full((3, 2), 2, dtype=torch.uint8)),
        "flagged other than 0, 1, 3",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.trace"
    save_trace(path, make_trace())
    tensors = load_file(path)
    change, message = MALFORMED[case]
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(StoreFormatError, match=message) as caught:
        load_trace(path)
    assert str(path) in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_cut_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "cut.trace"
    save_trace(path, make_trace())
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(StoreFormatError):
        load_trace(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError, match="none.trace"):
        load_trace(tmp_path / "none.trace")
