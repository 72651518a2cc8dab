"""A checkpoint to a store: scan, allocate ranks, compress expert by expert, write, publish.

Runs experts in parallel threads of one torch thread each, so that the result does not depend on how
many there are. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from expert_store.allocate import allocate_ranks, rank_cap
from expert_store.assemble import write_configuration, write_dense, write_layer
from expert_store.checkpoint import Checkpoint
from expert_store.config import CompressionConfig
from expert_store.errors import StoreWriteError
from expert_store.expert_json import form_json, repair_json
from expert_store.factor_records import factors_bytes
from expert_store.files import Disk
from expert_store.format import content_version, load_manifest
from expert_store.manifest_json import encode_manifest
from expert_store.recipe import check_finite, compress_expert, kurtosis_of
from expert_store.records import codes_bytes
from expert_store.shards import INDEX_FILE
from expert_store.staging import PARTIAL, Staging, check_target, staging
from expert_store.types import (
    FORMAT_VERSION,
    PROJECTIONS,
    CodesForm,
    ExpertInfo,
    ExpertKey,
    Manifest,
    ModelInfo,
    Recipe,
    RepairForm,
)

logger = logging.getLogger(__name__)

_SCAN = "scan.json"
_MARGIN_BYTES = 1 << 20  # headers, configuration, info files of the staging folder


class Progress(NamedTuple):
    """How far a stage is: `done` of `total` experts."""

    stage: Literal["scan", "compress"]
    done: int
    total: int


def compress(
    model: Path,
    store: Path,
    config: CompressionConfig,
    *,
    progress: Callable[[Progress], None] | None = None,
    jobs: int | None = None,
    force: bool = False,
    disk: Disk | None = None,
) -> Manifest:
    """Compress the checkpoint in `model` (see `resolve_model`) into the folder `store`.

    `jobs` is the number of experts at a time, by default one per core. The same arguments give the
    same bytes, whatever `jobs` and however often interrupted. Peak memory is a few experts per job.

    Raises ValueError for a wrong argument or a target that is not free, CheckpointError for an
    unusable checkpoint, StoreWriteError when the disk is or would be full. After an error the
    target is never a store, except the old one that `force` was to replace.
    """
    disk, report = disk or Disk(), progress or (lambda _: None)
    model, store = Path(model), Path(store)
    num_jobs = jobs if jobs is not None else usable_cores()
    if num_jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected 1 or more")
    check_target(store, force=force)
    checkpoint = Checkpoint(model)
    info, recipe = checkpoint.model_info, config.as_recipe()
    _check_recipe(recipe, info)
    logger.info("compressing %s into %s: %s", model, store, recipe)
    fingerprint = config.fingerprint(_source_id(model))
    _check_space(checkpoint, recipe, store, store / PARTIAL / fingerprint, disk)
    with staging(store, fingerprint, force=force, disk=disk) as work:
        if not work.is_finished:
            with _workers(num_jobs) as pool:
                kurtosis = _scan(work, checkpoint, pool, report)
                ranks = allocate_ranks(
                    kurtosis,
                    avg_rank=recipe.avg_rank,
                    ladder=recipe.rank_ladder,
                    cap=rank_cap(info.expert, recipe.factor_bits),
                )
                experts = _compress_experts(work, checkpoint, pool, recipe, kurtosis, ranks, report)
            _finish(work, checkpoint, recipe, experts)
        work.publish()
    return load_manifest(store)


def _scan(
    work: Staging,
    checkpoint: Checkpoint,
    pool: ThreadPoolExecutor,
    report: Callable[[Progress], None],
) -> dict[ExpertKey, float]:
    """Kurtosis of every expert; also finds NaN before hours of work are spent."""
    keys = checkpoint.keys
    if (known := work.read_json(_SCAN)) is not None:
        return dict(zip(keys, known, strict=True))

    def scan(key: ExpertKey) -> float:
        weights = checkpoint.expert(key)
        check_finite(weights)
        return kurtosis_of(weights)

    values = []
    for done, value in enumerate(pool.map(scan, keys), start=1):
        values.append(value)
        report(Progress("scan", done, len(keys)))
    work.write_json(_SCAN, values)
    return dict(zip(keys, values, strict=True))


def _compress_experts(
    work: Staging,
    checkpoint: Checkpoint,
    pool: ThreadPoolExecutor,
    recipe: Recipe,
    kurtosis: dict[ExpertKey, float],
    ranks: dict[ExpertKey, int],
    report: Callable[[Progress], None],
) -> list[ExpertInfo]:
    """Stage every expert that is not staged yet, and join each layer as soon as it is complete."""
    shape = checkpoint.model_info.expert

    def run(key: ExpertKey) -> dict[str, Any]:
        if (known := work.expert_info(key)) is not None:
            return known
        result = compress_expert(checkpoint.expert(key), shape, recipe, ranks[key])
        info = {
            "form": form_json(result.form),
            "repair": repair_json(result.repair),
            "block_gains": list(result.block_gains),
            "kurtosis": kurtosis[key],
            "error": result.error,
            "restored_error": result.restored_error,
        }
        return work.put_expert(key, {"codes": result.codes, "factors": result.factors}, info)

    futures: dict[ExpertKey, Future[dict[str, Any]]] = {
        key: pool.submit(run, key) for key in checkpoint.keys
    }
    experts: list[ExpertInfo] = []
    for layer in checkpoint.model_info.moe_layers:
        infos = {}
        for key in (key for key in futures if key.layer == layer):
            infos[key] = futures[key].result()
            report(Progress("compress", len(experts) + len(infos), len(futures)))
        experts += write_layer(work, layer, infos, shape)
    return experts


def _finish(
    work: Staging, checkpoint: Checkpoint, recipe: Recipe, experts: list[ExpertInfo]
) -> None:
    dense_files = write_dense(work, checkpoint)
    side_files = write_configuration(work, checkpoint.path, recipe)
    side_files[INDEX_FILE] = work.sha256(INDEX_FILE)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        version="",
        recipe=recipe,
        model=checkpoint.model_info,
        experts={info.key: info for info in experts},
        dense_files=dense_files,
        side_files=side_files,
    )
    manifest = replace(manifest, version=content_version(manifest))
    records = {record.file for info in experts for record in (info.codes, info.factors) if record}
    work.finish([*dense_files, *side_files, *records], encode_manifest(manifest))


@contextmanager
def _workers(num_jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads of one torch thread each; after an error what has not begun is dropped."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        num_jobs, thread_name_prefix="compress", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def usable_cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_recipe(recipe: Recipe, info: ModelInfo) -> None:
    limit = min(info.expert.hidden, info.expert.ffn)
    if recipe.avg_rank > limit:
        raise ValueError(
            f"avg_rank: got {recipe.avg_rank}, over the rank of this model's experts: expected at "
            f"most {limit} for matrices of {info.expert.ffn} x {info.expert.hidden}"
        )
    if recipe.top_n > info.top_k:
        raise ValueError(
            f"top_n: got {recipe.top_n}, expected at most {info.top_k}, the experts per token"
        )


def _check_space(
    checkpoint: Checkpoint, recipe: Recipe, store: Path, staged: Path, disk: Disk
) -> None:
    """Refuse at the door what cannot fit: the store, and one layer twice while it is joined."""
    info = checkpoint.model_info
    num_experts = sum(info.num_experts.values())
    blocks = recipe.avg_rank * num_experts // 16 * len(PROJECTIONS)
    one = RepairForm.of_letters(recipe.factor_bits, recipe.factor_grid, "g")
    block = factors_bytes(info.expert, one)  # the same for all three
    codes = codes_bytes(info.expert, CodesForm.uniform(int(recipe.bits), recipe.grid))
    experts = num_experts * codes + blocks * block
    layer = -(-experts * max(info.num_experts.values()) // num_experts)
    dense = sum(stored.entry.num_bytes for stored in checkpoint.dense.values())
    done = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    needed = experts + layer + dense + _MARGIN_BYTES - done
    folder = next(path for path in (store, *store.absolute().parents) if path.is_dir())
    if (free := disk.free_bytes(folder)) < needed:
        raise StoreWriteError(
            f"{store}: too little disk: compressing needs {needed} more bytes, {free} are free in "
            f"{folder}; free some space or choose another disk"
        )


def _source_id(model: Path) -> str:
    """Changes when the checkpoint does: names, sizes and times of its files, content of config."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for path in sorted(model.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
