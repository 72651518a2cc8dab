"""Makes the store of an experiment and measures it; what the cache folder holds is not made again.

Knows no page. Stops measuring at a deadline, after which only kept rows are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.per_byte.experiment import ORIGINAL, Experiment
from benchmarks.per_byte.experiments import CACHED
from cluster.docstrings import built_in_calibration_text
from cluster.environment import cache_folder
from cluster.eval_model import opened
from cluster.eval_rows import EvalRow, RowFile
from cluster.eval_settings import EvalSettings, Variant
from cluster.evaluate import evaluate, row_key
from cluster.judge import Judge
from cluster.recalibrate import RecalibrationSettings, recalibrate_store
from cluster.report.lines import Line
from cluster.stores import original_store
from cluster.texts import EvalText, built_in_text
from expert_store.calibration import Calibration, is_calibration, save_calibration
from expert_store.calibration_file import load_info, load_layer
from expert_store.compress import compress
from expert_store.config import CompressionConfig
from expert_store.format import is_store, load_manifest
from gpu_worker.record_sizes import RecordSizes
from gpu_worker.replay import RoutingTrace, recorded, uncached_bytes
from gpu_worker.scoring import cut_windows, score_windows

BISECTIONS = 24
TRACE_WINDOWS = 8
RECALIBRATION_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Result:
    """What an experiment gave."""

    experiment: Experiment
    line: Line
    store: Path
    made_s: float | None  # compressing; None when the store was there before this was kept


@dataclass(slots=True)
class Runner:
    """Measures experiments of one model. Quality is measured on the same windows for all, bytes at
    every cache size and batch for those in `CACHED`."""

    model: Path
    texts: Sequence[EvalText]
    settings: EvalSettings
    rows: RowFile
    deadline: float = math.inf  # of time.monotonic()
    remake: str | None = None
    jobs: int | None = None
    say: Callable[[str], None] = print
    done: dict[str, Result] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)  # label -> why it was not measured
    _traces: dict[Path, RoutingTrace] = field(default_factory=dict)

    def run(self, experiments: Sequence[Experiment]) -> Iterator[Result]:
        """Results as they come. What cannot be made, or is not reached in time, is in `left`."""
        original = original_store(self.model)
        for item in experiments:
            result = self._measured(item, original)
            if result is not None:
                self.done[item.label] = result
                yield result

    def _measured(self, item: Experiment, original: Path) -> Result | None:
        wanted = [label for label in (item.base, item.budget_of, item.equal_bytes_to) if label]
        if missing := [label for label in wanted if label not in self.done]:
            return self._leave(item, f"needs {missing[0]}, which was not measured")
        late = time.monotonic() > self.deadline
        started = time.monotonic()
        store, refusal = self._store(item, original, make=not late)
        if store is not None and item.recalibrated:
            store = self._recalibrated(store, original, make=not late)
            refusal = "no time was left"
        if store is None:
            return self._leave(item, refusal)
        policies = self._policies(item, store)
        if policies is None:
            return self._leave(item, "its base restores no pair, or all of them")
        variant = Variant(item.label, store, **policies)
        settings = self.settings if item.label in CACHED else _light(self.settings)
        if late and not self._is_kept(variant, settings, original):
            return self._leave(item, "no time was left")
        made = time.monotonic()
        rows = list(evaluate([variant], self.texts, settings, original=original, rows=self.rows))
        for row in rows:
            _check_bytes(row)
        baseline = self.done[ORIGINAL].line.rows if item.label != ORIGINAL else ()
        line = Line.of(item.label, item.family, rows, baseline)
        spent = time.monotonic() - made
        self.say(
            f"{item.label:60} {line.bits:7.3f} bits  KL {line.point.loss:.5f}  "
            f"made in {made - started:.0f} s, measured in {spent:.0f} s"
        )
        return Result(item, line, store, _seconds(store))

    def _leave(self, item: Experiment, why: str) -> None:
        self.left[item.label] = why
        self.say(f"{item.label:60} left out: {why}")

    def _store(self, item: Experiment, original: Path, *, make: bool) -> tuple[Path | None, str]:
        if item.config.recipe == "original":
            return original, ""
        config = self._config(item)
        path = cache_folder() / "stores" / f"{self.model.name}-{config.recipe}-{self._id(config)}"
        remake = self.remake is not None and item.label.startswith(self.remake)
        if is_store(path) and not (remake and make):
            return path, ""
        if not make:
            return None, "no time was left"
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        try:
            compress(
                self.model,
                path,
                config,
                jobs=self.jobs,
                force=True,
                curves=cache_folder() / "curves",
            )
        except ValueError as error:
            if not str(error).startswith("budget:"):
                raise
            return None, str(error)
        _seconds_file(path).write_text(json.dumps(time.monotonic() - started))
        return path, ""

    def _recalibrated(self, store: Path, original: Path, *, make: bool) -> Path | None:
        """A copy of the store, its routers fitted on the built-in calibration text."""
        target = store.with_name(f"{store.name}-recalibrated")
        if not is_store(target) and make:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(store, target)
            recalibrate_store(
                target,
                original,
                [built_in_calibration_text()],
                [built_in_text()],
                RecalibrationSettings(tokens=RECALIBRATION_TOKENS, eval_windows=1),
            )
        return target if is_store(target) else None

    def _config(self, item: Experiment) -> CompressionConfig:
        config = item.config
        if item.budget_of is not None:
            # Rounded down: routing on the texts is not that of the calibration, so it is no bound.
            config = replace(
                config, budget=math.floor(self.done[item.budget_of].line.bits * 100) / 100
            )
        if item.no_sensitivity:
            assert config.calibration is not None, "left out without a calibration"
            config = replace(config, calibration=without_sensitivity(config.calibration))
        return config

    def _id(self, config: CompressionConfig) -> str:
        """Of model, config and what the calibration holds."""
        source = hashlib.sha256(str(self.model.resolve()).encode())
        for file in sorted(path for path in self.model.iterdir() if path.is_file()):
            status = file.stat()
            source.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
        if config.calibration is not None:
            source.update(Calibration(config.calibration).id.encode())
        return config.fingerprint(source.hexdigest())

    def _policies(self, item: Experiment, store: Path) -> Mapping[str, Any] | None:
        """The policies, with the threshold that moves the base's bytes; None where none does."""
        if item.equal_bytes_to is None:
            return item.policies
        top_n = load_manifest(store).recipe.top_n
        if not 0 < top_n < load_manifest(store).model.top_k:
            return None
        rule = item.policies["restore"]
        if rule == "random":
            return {"restore": rule, "top_n": top_n}
        return {"restore": rule, f"restore_{rule}": self._threshold(rule, store)}

    def _threshold(self, rule: str, store: Path) -> float:
        """Bisected on where the texts' tokens go; to five digits, which the label does not show."""
        with opened(Variant("thresholds", store)) as ready:
            trace = self._traces.setdefault(store, _trace(ready, self.texts, self.settings))
            config, manifest = ready.model.config, ready.manifest
            sizes = RecordSizes.of(manifest)
            wanted = uncached_bytes(trace, config.pair_policy(manifest), sizes)
            low, high = 0.0, 1.0
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                tried = replace(config, restore=rule, **{f"restore_{rule}": middle})
                moved = uncached_bytes(trace, tried.pair_policy(manifest), sizes)
                # More mass restores more pairs, a higher bar for the benefit fewer.
                if (moved > wanted) == (rule == "mass"):
                    high = middle
                else:
                    low = middle
        return round((low + high) / 2, 5)

    def _is_kept(self, variant: Variant, settings: EvalSettings, original: Path) -> bool:
        manifest, version = load_manifest(variant.store), Judge(original).version
        return all(
            self.rows.get(row_key(variant, manifest, text, settings, version)) is not None
            for text in self.texts
        )


def without_sensitivity(folder: Path) -> Path:
    """The calibration with every layer's relative error counting the same, in the cache folder."""
    info, checksums, identity = load_info(folder)
    target = cache_folder() / "calibrations" / f"{folder.name}-flat-{identity[:12]}"
    if not is_calibration(target):
        target.mkdir(parents=True, exist_ok=True)
        tensors = {
            layer: load_layer(folder, layer, info.model, info.forms, checksums[layer])
            for layer in info.tables
        }
        save_calibration(target, replace(info, sensitivity=None), tensors)
    return target


def _trace(ready: Any, texts: Sequence[EvalText], settings: EvalSettings) -> RoutingTrace:
    """Of a few windows of the first text."""
    ids = ready.model.tokenizer(texts[0].text, add_special_tokens=False, verbose=False)["input_ids"]
    windows_WT = cut_windows(
        ids,
        num_windows=min(TRACE_WINDOWS, settings.windows),
        window_tokens=settings.window_tokens,
        seed=settings.seed,
    )
    with recorded(ready.model.runner) as recorder:
        score_windows(ready.model.runner, windows_WT, batch=1)
    return recorder.trace(settings.window_tokens)


def _light(settings: EvalSettings) -> EvalSettings:
    return replace(settings, batch=(1,), cache_percent=(0.0,))


def _check_bytes(row: EvalRow) -> None:
    for point in row.traffic:
        assert math.isclose(point.moved_bytes, point.planned_bytes), (
            f"{row.experts} on {row.text}: planned {point.planned_bytes} bytes, moved "
            f"{point.moved_bytes}; no page is written on a red gate"
        )


def _seconds_file(store: Path) -> Path:
    return store.with_name(f"{store.name}.seconds")


def _seconds(store: Path) -> float | None:
    file = _seconds_file(store)
    return float(json.loads(file.read_text())) if file.is_file() else None
