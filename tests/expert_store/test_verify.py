"""Goal: verify and inspect say what is damaged and what is there, by file, layer and expert.

Method: one small store; each test spoils a copy in one way and reads the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.errors import CorruptRecordError, StoreFormatError
from expert_store.format import load_manifest
from expert_store.inspect import bytes_per_token, summarize
from expert_store.types import ExpertKey, RecordInfo
from expert_store.verify import check_files, verify
from kernels.types import block_bytes, matrix_bytes
from tests.hand_store import build_store
from tests.tiny_checkpoints import write_tiny_checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    model = write_tiny_checkpoint("qwen2_moe", folder / "model", hidden=128, ffn=192, experts=3)
    (model / "tokenizer.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    compress(model, folder / "store", CompressionConfig(recipe="paper", avg_rank=8))
    return folder / "store"


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "store"))


def codes_of(store: Path, layer: int, expert: int) -> RecordInfo:
    return load_manifest(store).experts[ExpertKey(layer, expert)].codes


def rewrite(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def test_a_whole_store(pristine: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = verify(pristine, lambda done, total: seen.append((done, total)))
    assert result.damage == ()
    assert result.num_records == 6 + 3  # every second expert has a compensator
    assert result.num_files == len([p for p in pristine.rglob("*") if p.is_file()]) - 1
    assert seen[-1] == (result.num_bytes, result.num_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_of_a_record(place: str, bit: int, store: Path) -> None:
    record = codes_of(store, 1, 2)
    at = {"first": 0, "middle": record.num_bytes // 2, "last": record.num_bytes - 1}[place]

    def flip(data: bytearray) -> None:
        data[record.offset + at] ^= 1 << bit

    rewrite(store / record.file, flip)
    (damage,) = verify(store).damage
    assert (damage.file, damage.key) == ("codes/layer-00001.safetensors", ExpertKey(1, 2))
    assert damage.expected == f"sha256 {record.sha256}"
    assert damage.found.startswith("sha256 ")
    assert "layer 1 expert 2: expected sha256" in str(damage)


def test_a_damaged_compensator(store: Path) -> None:
    infos = load_manifest(store).experts.values()
    info = next(info for info in infos if info.factors is not None)
    rewrite(store / info.factors.file, lambda data: data.__setitem__(info.factors.offset, 255))
    (damage,) = verify(store).damage
    assert (damage.file, damage.key) == (info.factors.file, info.key)


def test_swapped_records_are_told_apart(store: Path) -> None:
    one, two = codes_of(store, 0, 0), codes_of(store, 0, 1)

    def swap(data: bytearray) -> None:
        first = slice(one.offset, one.offset + one.num_bytes)
        second = slice(two.offset, two.offset + two.num_bytes)
        data[first], data[second] = data[second], data[first]

    rewrite(store / one.file, swap)
    damage = verify(store).damage
    assert [item.key for item in damage] == [ExpertKey(0, 0), ExpertKey(0, 1)]
    assert damage[0].found.endswith("which is the codes record of layer 0 expert 1")
    assert damage[1].found.endswith("which is the codes record of layer 0 expert 0")


def test_swapped_files(store: Path) -> None:
    one, two = (store / f"codes/layer-0000{i}.safetensors" for i in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    damage = verify(store).damage
    assert {item.key for item in damage} == {ExpertKey(i, j) for i in (0, 1) for j in range(3)}
    assert all("which is the codes record of layer" in item.found for item in damage)


def test_a_truncated_file(store: Path) -> None:
    record = codes_of(store, 0, 2)
    rewrite(store / record.file, lambda data: data.__delitem__(slice(record.offset + 100, None)))
    damage = verify(store).damage
    assert {item.file for item in damage} == {record.file}
    assert damage[-1].key == ExpertKey(0, 2)
    assert damage[-1].expected == f"{record.num_bytes} bytes"
    assert "a truncated file" in damage[-1].found
    assert "the file ends after 100" in damage[-1].found


def test_a_missing_file_is_said_once(store: Path) -> None:
    (store / "codes/layer-00001.safetensors").unlink()
    (damage,) = verify(store).damage
    assert str(damage) == "codes/layer-00001.safetensors: expected a file, found none"


def test_a_damaged_header(store: Path) -> None:
    record = codes_of(store, 0, 0)

    def rename(data: bytearray) -> None:
        at = data.index(b"expert-00000")
        data[at : at + 12] = b"expert-00009"

    rewrite(store / record.file, rename)
    (damage,) = verify(store).damage
    assert damage.key == ExpertKey(0, 0)
    assert "no such tensor" in damage.found


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_damaged_dense_file(how: str, store: Path) -> None:
    path = store / "dense-00000.safetensors"
    if how == "missing":
        path.unlink()
    else:
        rewrite(path, lambda data: data.__setitem__(-1, data[-1] ^ 1))
    (damage,) = verify(store).damage
    assert (damage.file, damage.key) == ("dense-00000.safetensors", None)
    assert damage.expected.startswith("sha256 ")


SIDE_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
)


def test_every_file_but_the_manifest_has_a_checksum(pristine: Path) -> None:
    manifest = load_manifest(pristine)
    assert sorted(manifest.side_files) == list(SIDE_FILES)
    there = {path.name for path in pristine.iterdir() if path.is_file()}
    assert there == {*manifest.side_files, *manifest.dense_files, "manifest.json"}


@pytest.mark.parametrize("how", ["changed", "missing"])
@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_damaged_side_file(name: str, how: str, store: Path) -> None:
    path = store / name
    if how == "missing":
        path.unlink()
    else:
        rewrite(path, lambda data: data.extend(b" "))
    (damage,) = verify(store).damage
    assert (damage.file, damage.key) == (name, None)
    assert damage.expected == f"sha256 {load_manifest(store).side_files[name]}"
    assert damage.found.startswith("sha256 " if how == "changed" else "No such file")


@pytest.mark.parametrize("name", ["dense-00000.safetensors", *SIDE_FILES])
def test_a_model_is_not_opened_from_a_changed_file(name: str, store: Path) -> None:
    manifest = load_manifest(store)
    check_files(store, manifest)
    rewrite(store / name, lambda data: data.__setitem__(-1, data[-1] ^ 1))
    with pytest.raises(CorruptRecordError, match="found sha256 .*--force") as caught:
        check_files(store, manifest)
    expected = {**manifest.dense_files, **manifest.side_files}[name]
    assert str(caught.value).startswith(f"{store}: {name}: expected sha256 {expected}, found")
    (store / name).unlink()
    with pytest.raises(StoreFormatError, match=f"{name}: expected sha256 .*, found No such file"):
        check_files(store, manifest)


def test_a_damaged_manifest_is_an_error(store: Path) -> None:
    rewrite(store / "manifest.json", lambda data: data.replace(b'"kurtosis":', b'"kurtosis":1', 1))
    text = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(text.replace('"kurtosis":', '"kurtosis":1', 1))
    with pytest.raises(StoreFormatError, match="its content hashes to"):
        verify(store)


def test_summary_adds_up(pristine: Path) -> None:
    summary = summarize(pristine)
    codes = 3 * matrix_bytes(192, 128, 2)
    factors = 3 * block_bytes(192, 128, 3)
    assert summary.codes_bytes == 6 * codes
    assert summary.factors_bytes == 3 * factors
    assert summary.original_expert_bytes == 6 * 3 * 192 * 128 * 2
    assert summary.dense_bytes == (pristine / "dense-00000.safetensors").stat().st_size
    assert summary.code_bits_per_weight == pytest.approx(2.5)
    assert summary.ranks == {0: 3, 16: 3}
    assert sum(layer.factors_bytes for layer in summary.layers) == summary.factors_bytes
    assert [layer.num_experts for layer in summary.layers] == [3, 3]
    for layer in summary.layers:
        assert layer.bits == 2
        assert layer.matrices == {"affine": 9}
        assert layer.blocks["plane"] == 0
        assert layer.rank == 16 * layer.blocks["rank"] / 9
        assert 0 < layer.restored_error <= layer.error < 0.5
    # Two layers, k = 2 codes each, n = 1 compensator of the layer's mean size.
    assert summary.bytes_per_token == 2 * 2 * codes + summary.factors_bytes // 3
    assert summary.original_bytes_per_token == 2 * 2 * 3 * 192 * 128 * 2
    manifest = load_manifest(pristine)
    assert bytes_per_token(manifest, top_n=0) == 2 * 2 * codes
    assert bytes_per_token(manifest, top_n=2) == 2 * 2 * codes + 2 * summary.factors_bytes // 3


def test_summary_tells_forms_apart(tmp_path: Path) -> None:
    build_store(
        tmp_path,
        bits=(16, 1, 3),
        grids=("affine", "symmetric", "symmetric"),
        blocks="gUUd",
        factor_grid="symmetric",
    )
    for layer in summarize(tmp_path).layers:
        assert layer.bits == pytest.approx(20 / 3)
        assert layer.matrices == {"bf16": 3, "symmetric": 6}
        assert layer.blocks == {"rank": 2 * 3, "plane": 2 * 3}
        assert layer.rank == pytest.approx(16 * 2 / 3)
        assert (layer.error, layer.restored_error) == pytest.approx((0.4, 0.2))


def test_summary_of_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError, match="not a finished store"):
        summarize(tmp_path)
