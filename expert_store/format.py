"""The store's format, version 2, as a spec; and load and save of its manifest.

Files (paths are relative to the store; no other path is ever accepted):

    manifest.json                    what exists; written last: a folder without it is no store
    config.json, tokenizer files...  as transformers wants them: the side files
    dense*.safetensors               all that is not a routed expert, original names and types
    codes/layer-LLLLL.safetensors    tensor "expert-EEEEE": uint8, one whole codes record
    factors/layer-LLLLL.safetensors  likewise factors records, of experts that have blocks

Layer and expert numbers are decimal, five digits. A safetensors header is padded with spaces so
that the data starts at a multiple of 64 bytes in the file; every record's length is a multiple
of 64, so every record starts at one. `RecordInfo.offset` counts from the start of the file.
Readers go by the manifest's offsets and checksums alone: records behind a damaged safetensors
header are still served, and `verify` reports the header.

Codes record: gate [F, H], up [F, H], down [H, F]; then, where the experts have biases, gate [F],
up [F], down [H] as little-endian float32. Every part starts at a multiple of 64 bytes and the gaps
are zero. The expert's form says what the three are:

    codec "tiles"   the layout of `kernels/types.py`, bits and grid for each matrix by itself: tiles
                    of 16 rows x 64 inputs, affine at 2, 3 and 4 bits, symmetric at 1 to 4 (those
                    end with a table of row scales); or row-major bfloat16, bits 16, "affine".
                    Groups have 64 inputs unless the form has a field group_size: a multiple of 32
    codec "sz3", "cuszp"   error-bounded streams of `part_bytes` bytes, in bits 0, "affine": see
                    `expert_store/codecs/`. sz3 becomes bfloat16 on the host that fetches it

Factors record: blocks one after the other, in falling order of what they repair per byte; each is a
multiple of 64 bytes long. A rank block adds rank 16 to one projection: right [16, cols], then, from
a multiple of 64 bytes on, left transposed [16, rows], both packed with the bits and the grid of the
expert's repair. A plane adds one more bit to every weight of one projection: a symmetric matrix of
1 bit, [rows, cols]. Any prefix of the blocks is a valid compensator and a prefix of the bytes.

Manifest: UTF-8 JSON, one object:

    format "moetier-store"; format_version 2; version: sha256 of the canonical JSON of the rest
    recipe {name, codec, bits, grid, factor_bits, factor_grid, avg_rank, rank_ladder, top_n, seed,
            budget, calibration, error_bound}: the last three may be null; and group_size where it
            is not 64
    model  {name, model_type, num_layers, top_k, vocab_size, max_positions,
            expert {hidden, ffn, activation, has_bias},
            moe_layers {"L": path}, num_experts {"L": n}}
    dense_files, side_files {file: sha256 of the file}
    experts [{layer, expert,
              form {codec, bits [gate, up, down], grids likewise, part_bytes likewise or null},
              repair {bits, grid, blocks "gudG..."}: g, u, d rank blocks, G, U, D planes,
              block_gains [one for each block], kurtosis, error, restored_error,
              codes {file, offset, num_bytes, sha256}, factors likewise or null}]

Limits: manifest 512 MiB; 4096 layers; 65536 experts a layer, 1000000 in all; 4096 blocks an expert;
hidden and ffn 2^20; 10000 dense and 10000 side files; offsets 2^50. Every field is there, no other,
none twice; experts are complete.

Failures, each a StoreFormatError that names file and field: no manifest, not JSON, duplicate key,
missing or unknown field, wrong type, out of limits, a newer or an older
format version, a file name other than
the one the layout gives, a length other than the shape gives, overlapping records, an expert
missing, extra or twice, a version that does not match the content. A record or file whose
bytes do not match its checksum is a CorruptRecordError.
"""

from __future__ import annotations

from pathlib import Path

from expert_store.errors import StoreFormatError
from expert_store.expert_json import record_file, record_name
from expert_store.factor_records import (
    FactorBlock,
    PlaneBlock,
    blocks_within,
    encode_factors,
    factors_bytes,
    parse_factors,
)
from expert_store.files import Disk
from expert_store.manifest_json import content_version, decode_manifest, encode_manifest
from expert_store.records import (
    ALIGNMENT,
    codes_bytes,
    decode_on_host,
    device_form,
    encode_codes,
    encode_parts,
    form_of,
    parse_codes,
)
from expert_store.types import Manifest

__all__ = [
    "ALIGNMENT",
    "MANIFEST_FILE",
    "FactorBlock",
    "PlaneBlock",
    "blocks_within",
    "codes_bytes",
    "content_version",
    "decode_on_host",
    "device_form",
    "encode_codes",
    "encode_factors",
    "encode_parts",
    "factors_bytes",
    "form_of",
    "is_store",
    "load_manifest",
    "parse_codes",
    "parse_factors",
    "record_file",
    "record_name",
    "save_manifest",
]

MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 512 << 20


def is_store(folder: Path) -> bool:
    """Whether the folder holds a finished store (its manifest is written last)."""
    return (folder / MANIFEST_FILE).is_file()


def load_manifest(store: Path) -> Manifest:
    """Read and check a store's manifest; no record is read.

    Raises StoreFormatError naming the file and the field that does not follow the format.
    """
    path = Path(store) / MANIFEST_FILE
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise StoreFormatError(
            f"{store}: no readable {MANIFEST_FILE} ({error.strerror}); this folder is not a "
            "finished store: compress a model into it with `moetier compress`"
        ) from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise StoreFormatError(
            f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, the file is larger"
        )
    return decode_manifest(text, str(path))


def save_manifest(store: Path, manifest: Manifest, disk: Disk | None = None) -> None:
    """Write a store's manifest atomically: after this the folder is a store."""
    assert manifest.version == content_version(manifest), (
        f"manifest version {manifest.version} is not that of its content"
    )
    text = encode_manifest(manifest)
    (disk or Disk()).write_atomic(Path(store) / MANIFEST_FILE, len(text), [text])
