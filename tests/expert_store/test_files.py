"""Goal: a file is there whole or not at all, and a broken safetensors file is named, never trusted.

Method: a failing disk, and headers that lie; the safetensors library as the other implementation.
"""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from expert_store.errors import StoreFormatError, StoreWriteError
from expert_store.files import Disk, layout, read_bytes, read_header, read_tensor


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    sha256 = Disk().write_atomic(path, 6, [b"abc", memoryview(b"def")])
    assert path.read_bytes() == b"abcdef"
    assert sha256 == hashlib.sha256(b"abcdef").hexdigest()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file(code: int, tmp_path: Path) -> None:
    class Full(Disk):
        def open(self, path: Path) -> IO[bytes]:
            raise OSError(code, "full")

        def free_bytes(self, folder: Path) -> int:
            return 12

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(
        StoreWriteError, match=f"{tmp_path}: the disk is full: file needs 3 bytes, 12"
    ):
        Full().write_atomic(path, 3, [b"new"])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_producer_is_not_dressed_up(tmp_path: Path) -> None:
    def chunks() -> Any:
        yield b"abc"
        raise RuntimeError("producer")

    with pytest.raises(RuntimeError, match="producer"):
        Disk().write_atomic(tmp_path / "file", 6, chunks())
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.bool]),
)
def test_both_ways_with_the_library(
    shapes: list[list[int]], dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
    names[torch.bool] = "BOOL"
    tensors = {
        f"t{i}": torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
        for i, shape in enumerate(shapes)
    }
    raw = {name: t.flatten().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
    header, entries = layout(
        [(name, names[dtype], tuple(t.shape), len(raw[name])) for name, t in tensors.items()], {}
    )
    assert len(header) % 64 == 0
    ours = header + b"".join(raw.values())
    for name, tensor in load(ours).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name])
    folder = tmp_path_factory.mktemp("files")
    for file, data in (("ours", ours), ("theirs", save(tensors))):
        (folder / file).write_bytes(data)
        found = read_header(folder / file)
        assert found.keys() == tensors.keys()
        for name, entry in found.items():
            assert torch.equal(read_tensor(folder / file, entry), tensors[name])
    assert {entry.name: entry for entry in entries} == read_header(folder / "ours")


def test_one_row_is_read_alone(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).view(4, 2, 3)
    (tmp_path / "f").write_bytes(save({"t": tensor}))
    entry = read_header(tmp_path / "f")["t"]
    for row in range(4):
        assert torch.equal(read_tensor(tmp_path / "f", entry, row), tensor[row])


def file_of(header: Any, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry_of(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in 0 bytes"),
        (b"\xff" * 8, "a header of 18446744073709551615 bytes"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "a header of 1099511627776 bytes in 10 bytes"),
        (file_of(b"{"), "not a whole safetensors file"),
        (file_of(b"\xff\xfe"), "not a whole safetensors file"),
        (file_of([1]), "the header is no JSON object"),
        (file_of({"t": 7}), "tensor 't' has a malformed entry"),
        (file_of({"t": {}}), "tensor 't' has a malformed entry"),
        (file_of(entry_of(data_offsets=[0])), "tensor 't' has a malformed entry"),
        (file_of(entry_of(data_offsets=["0", "8"])), "tensor 't' has a malformed entry"),
        (file_of(entry_of(shape=["2"])), "tensor 't' has a malformed entry"),
        (file_of(entry_of(data_offsets=[0, 16], shape=[4])), "reaches past the file's"),
        (file_of(entry_of(data_offsets=[-8, 0])), "reaches past"),
        (file_of(entry_of(data_offsets=[8, 0])), "reaches past"),
        (file_of(entry_of(shape=[3])), "does not match its shape"),
        (file_of(entry_of(shape=[-1, -2])), "tensor 't' has a malformed entry"),
        (file_of(entry_of(), b"\0" * 7), "reaches past the file's"),
    ],
)
def test_headers_that_lie(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(content)
    with pytest.raises(StoreFormatError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_file_that_ends_early_or_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcdef")
    assert bytes(read_bytes(tmp_path / "f", 2, 3).numpy()) == b"cde"
    with pytest.raises(StoreFormatError, match="expected 9 bytes at 2, the file ends after 4"):
        read_bytes(tmp_path / "f", 2, 9)
    with pytest.raises(StoreFormatError, match="cannot be read: No such file"):
        read_bytes(tmp_path / "none", 0, 1)
    with pytest.raises(StoreFormatError, match="No such file"):
        read_header(tmp_path / "none")


def test_a_type_that_torch_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file_of(entry_of(dtype="F4")))
    entry = read_header(tmp_path / "f")["t"]
    with pytest.raises(StoreFormatError, match="tensor 't' has type F4, expected one of"):
        read_tensor(tmp_path / "f", entry)
