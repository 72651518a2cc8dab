"""A checkpoint to a store: scan, plan, compress expert by expert, write, publish.

Runs experts in parallel threads of one torch thread each, so that the result does not depend on how
many there are. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from expert_store.assemble import write_configuration, write_dense, write_layer
from expert_store.calibration import Calibration
from expert_store.checkpoint import Checkpoint
from expert_store.config import CompressionConfig
from expert_store.curves import choice_json, read_choice
from expert_store.expert_json import form_json, repair_json
from expert_store.files import Disk
from expert_store.format import content_version, load_manifest
from expert_store.kept_curves import KeptCurves
from expert_store.manifest_json import encode_manifest
from expert_store.planning import ExpertScan, Planned, curves_of, make_plans
from expert_store.prior import load_prior
from expert_store.recipe import check_finite, compress_expert, energies, kurtosis_of
from expert_store.sampling import ExpertCurves, Sample
from expert_store.shards import INDEX_FILE
from expert_store.space import check_space
from expert_store.staging import PARTIAL, Staging, check_target, staging
from expert_store.statistics import ExpertStatistics
from expert_store.types import (
    FORMAT_VERSION,
    PROJECTIONS,
    ExpertInfo,
    ExpertKey,
    Manifest,
    ModelInfo,
    Recipe,
)
from kernels.types import check_group_size

logger = logging.getLogger(__name__)

_SCAN = "scan.json"
_CURVES = "samples.json"


class Progress(NamedTuple):
    """How far a stage is: `done` of `total` experts."""

    stage: Literal["scan", "plan", "compress"]
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
    curves: Path | None = None,
) -> Manifest:
    """Compress the checkpoint in `model` (see `resolve_model`) into the folder `store`.

    `jobs` is the number of experts at a time, by default one per core. The same arguments give the
    same bytes, whatever `jobs` and however often interrupted. Peak memory is a few experts per job.
    In the folder `curves` a solver's measurements are kept for another budget.

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
    info = checkpoint.model_info
    _check_recipe(config.as_recipe(), info)
    calibration = open_calibration(config.calibration, info)
    logger.info("compressing %s into %s: %s", model, store, config)
    prior = None if config.prior is None else load_prior(config.prior, info)
    checkpoint_id = _source_id(model)
    kept = KeptCurves.of(curves, checkpoint_id, config, calibration, disk)
    source = checkpoint_id + (calibration.id if calibration is not None else "")
    source += "" if prior is None else f" prior {sorted(prior.items())}"
    fingerprint = config.fingerprint(source)
    check_space(checkpoint, config, store, store / PARTIAL / fingerprint, disk)
    with staging(store, fingerprint, force=force, disk=disk) as work:
        if not work.is_finished:
            with _workers(num_jobs) as pool:
                run = _Run(work, checkpoint, config, calibration, prior, kept, pool, report)
                planned = run.plan(run.scan())
                experts = run.compress(planned)
            _finish(work, checkpoint, planned.recipe, experts)
        work.publish()
    return load_manifest(store)


def open_calibration(folder: Path | None, model: ModelInfo) -> Calibration | None:
    """The calibration in a folder, if one is given. Raises ValueError when it is another model's,
    StoreFormatError when the folder holds none."""
    if folder is None:
        return None
    calibration = Calibration(folder)
    calibration.check_model(model)
    return calibration


@dataclass(frozen=True, slots=True)
class _Run:
    """The three stages over all experts, each in parallel, each found again by a later run."""

    work: Staging
    checkpoint: Checkpoint
    config: CompressionConfig
    calibration: Calibration | None
    prior: Mapping[int, float] | None
    kept_curves: KeptCurves
    pool: ThreadPoolExecutor
    report: Callable[[Progress], None]

    def scan(self) -> dict[ExpertKey, ExpertScan]:
        """Kurtosis and energies; also finds NaN before hours of work are spent."""
        keys = self.checkpoint.keys
        if (known := self.work.read_json(_SCAN)) is None:
            known = []
            for done, value in enumerate(self.pool.map(self._scan_expert, keys), start=1):
                known.append([value.kurtosis, *value.energy])
                self.report(Progress("scan", done, len(keys)))
            self.work.write_json(_SCAN, known)
        return {
            key: ExpertScan(kurtosis, (gate, up, down))
            for key, (kurtosis, gate, up, down) in zip(keys, known, strict=True)
        }

    def plan(self, scans: dict[ExpertKey, ExpertScan]) -> Planned:
        model = self.checkpoint.model_info
        return make_plans(
            self.config, model, scans, self.calibration, self._measure, prior=self.prior
        )

    def compress(self, planned: Planned) -> list[ExpertInfo]:
        """Stage every expert that is not staged yet; join each layer as soon as it is complete."""
        shape = self.checkpoint.model_info.expert
        futures: dict[ExpertKey, Future[dict[str, Any]]] = {
            key: self.pool.submit(self._compress_expert, key, planned)
            for key in self.checkpoint.keys
        }
        experts: list[ExpertInfo] = []
        for layer in self.checkpoint.model_info.moe_layers:
            infos = {}
            for key in (key for key in futures if key.layer == layer):
                infos[key] = futures[key].result()
                self.report(Progress("compress", len(experts) + len(infos), len(futures)))
            experts += write_layer(self.work, layer, infos, shape)
        return experts

    def _scan_expert(self, key: ExpertKey) -> ExpertScan:
        weights = self.checkpoint.expert(key)
        check_finite(weights)
        return ExpertScan(kurtosis_of(weights), energies(weights, self._statistics(key)))

    def _measure(self, samples: Sequence[Sample]) -> list[ExpertCurves]:
        """Curves of sample experts, for the solver."""
        known = self.work.read_json(_CURVES)
        if known is None:
            known = self.kept_curves.get(samples, self._measure_all)
            self.work.write_json(_CURVES, known)
        return [
            {name: tuple(map(read_choice, value[name])) for name in PROJECTIONS} for value in known
        ]

    def _measure_all(self, samples: Sequence[Sample]) -> list[Any]:
        measured = []
        for done, value in enumerate(self.pool.map(self._measure_expert, samples), start=1):
            measured.append(value)
            self.report(Progress("plan", done, len(samples)))
        return measured

    def _measure_expert(self, sample: Sample) -> dict[str, list[Any]]:
        weights = self.checkpoint.expert(sample.key)
        curves = curves_of(weights, self.config, self.calibration, whole=sample.whole)
        return {name: list(map(choice_json, choices)) for name, choices in curves.items()}

    def _compress_expert(self, key: ExpertKey, planned: Planned) -> dict[str, Any]:
        if (known := self.work.expert_info(key)) is not None:
            return known
        weights = self.checkpoint.expert(key)
        result = compress_expert(
            weights,
            self.checkpoint.model_info.expert,
            planned.plans[key],
            self.config.how,
            factor_bits=planned.recipe.factor_bits,
            statistics=self._statistics(key) if self.config.how.weighted else None,
        )
        info = {
            "form": form_json(result.form),
            "repair": repair_json(result.repair),
            "block_gains": list(result.block_gains),
            "kurtosis": kurtosis_of(weights),
            "error": result.error,
            "restored_error": result.restored_error,
        }
        return self.work.put_expert(key, {"codes": result.codes, "factors": result.factors}, info)

    def _statistics(self, key: ExpertKey) -> ExpertStatistics | None:
        return None if self.calibration is None else self.calibration.expert(key)


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
    for name in PROJECTIONS:
        try:
            check_group_size(recipe.group_size, info.expert.projection(name)[1])
        except ValueError as error:
            raise ValueError(f"{name} of this model's experts: {error}") from error


def _source_id(model: Path) -> str:
    """Changes when the checkpoint does: names, sizes and times of its files, content of config."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for path in sorted(model.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
