"""The folder of a run: who may write into it, what is in it, and the progress people see."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastsskd import __version__, distributed, durable, hardware, health
from fastsskd.bad_steps import BadStep
from fastsskd.checkpoint import write_json
from fastsskd.config import Config, to_toml
from fastsskd.engine import Log, StagePlan
from fastsskd.errors import InputError
from fastsskd.evaluation import score_file
from fastsskd.progress import ProgressLine
from fastsskd.starting.report import StartReport
from fastsskd.weights import MODEL_FILE

RESULT, PROGRESS, METRICS, BAD_STEPS = "result.json", "progress.json", "metrics.jsonl", "bad_steps.jsonl"
COUNTS = ("num_ssl", "num_train", "num_eval")
"""Clips of each set; ``num_ssl`` is None without Multi-SSL."""
LIVE = ("headroom", "mfu")
LINE_FIELDS = {"stage", "step", "epoch", "lr", "grad_norm", "clips_per_second", "clips", "seconds", "wait", *LIVE}
"""Of a line of metrics.jsonl; whatever else it holds is the loss, its terms, and ``health.NAMES``."""
_PACKAGES = ("torch", "torchaudio", "timm", "deepspeed", "numba", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


class RunFolder:
    """Every rank has one; only rank 0 writes and speaks.

    Args:
        config: the resolved configuration; ``config.run.out`` is the folder.
        resume: continue the run in it.

    Raises:
        InputError: the folder holds something and ``resume`` is off, or nothing to resume.
    """

    def __init__(self, config: Config, resume: bool):
        self.config, self.resumed = config, resume
        self.path = Path(config.run.out)
        self.checkpoints, self.tensorboard = self.path / "checkpoints", self.path / "tensorboard"
        self.plots, self.scores = self.path / "plots", self.path / score_file.FOLDER
        self.is_writer = distributed.rank() == 0
        self._check(resume)
        distributed.barrier()  # nobody writes before everybody has looked
        self.progress: dict[str, Any] = {"stages": {}, "trained": {}}
        if resume and (self.path / PROGRESS).exists():
            self.progress |= json.loads((self.path / PROGRESS).read_text(encoding="utf-8"))
        self._begun = time.time()
        self.line: ProgressLine | None = None
        self._watch = health.Watch()

    def _check(self, resume: bool) -> None:
        occupied = self.path.is_dir() and any(self.path.iterdir())
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"run.out {self.path}: is a file; choose a folder")
        if resume and not (self.path / "config.toml").exists():
            raise InputError(f"run.out {self.path}: no run to resume here; leave out --resume to start one")
        if occupied and not resume:
            raise InputError(f"run.out {self.path}: already holds a run; add --resume, or choose another run.out")

    @property
    def skip_log(self) -> Path:
        """Where the clips are named that could not be used."""
        return self.path / "skipped.tsv"

    def model(self, stage: str) -> Path:
        """The model file a stage leaves behind."""
        return self.checkpoints / stage / MODEL_FILE

    def is_done(self, stage: str) -> bool:
        return stage in self.progress["stages"] and self.model(stage).exists()

    def trained(self, stage: str) -> dict[str, Any] | None:
        """What :meth:`note_trained` kept of a stage whose training has ended, though its evaluation may not."""
        return self.progress["trained"].get(stage) if self.model(stage).exists() else None

    def note_trained(self, stage: str, note: dict[str, Any], skipped: dict[str, str]) -> None:
        """Note that the model of ``stage`` is there, which weights it has, and the clips left out so far."""
        self.progress["trained"][stage] = note
        self._note_skipped(skipped)
        self._save_progress()

    def begin(self, steps: dict[str, int], deepspeed_config: dict[str, Any], counts: dict[str, int | None]) -> None:
        """Claim the folder: write the configuration, drop what a killed run logged after its last checkpoint.

        Args:
            counts: by the names of ``COUNTS``.
        """
        self.line = ProgressLine(steps, self.is_writer)
        if self.is_writer:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / RESULT).unlink(missing_ok=True)  # an earlier try's; a run that is killed leaves none
            (self.path / "config.toml").write_text(to_toml(self.config), encoding="utf-8")
            write_json(self.path / "ds_config.json", self._without_own_folder(deepspeed_config))
            if not self.resumed:
                (self.path / METRICS).write_text("", encoding="utf-8")
        self.progress.update(counts)
        self._save_progress()
        self.say(f"run {self.path}: {clip_counts(counts)}; stages: {', '.join(steps)}")

    def _without_own_folder(self, deepspeed_config: dict[str, Any]) -> dict[str, Any]:
        """``deepspeed_config`` for another run too: its TensorBoard files belong into that run's folder."""
        logs = deepspeed_config.get("tensorboard", {})
        if logs.get("output_path") != str(self.tensorboard):
            return deepspeed_config
        return deepspeed_config | {
            "tensorboard": {k: v for k, v in logs.items() if k not in ("output_path", "job_name")}
        }

    def say(self, text: str) -> None:
        """Tell people something, once."""
        if self.line is not None:
            self.line.say(text)
        elif self.is_writer:
            print(text, file=sys.stderr, flush=True)

    def note_start(self, stage: str, source: str | Path, report: StartReport) -> None:
        """Say which weights a stage begins with, and write what became of each."""
        for line in (f"{stage}: starts from {source}", *report.lines()):
            self.say(line)
        if self.is_writer:
            durable.write_text(self.path / f"start-{stage}.tsv", report.table())

    def begin_stage(self, stage: str, step: int) -> None:
        """Forget what was logged of ``stage`` after ``step``, by a run that was killed after its last checkpoint."""
        self._logged_step, self._watch = step, health.Watch()
        if not (self.is_writer and self.resumed):
            return
        kept = [line for line in read_metrics(self.path) if line["stage"] != stage or line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        durable.write_text(self.path / METRICS, text)

    def log(
        self, stage: str, plan: StagePlan, log: Log, monitor: Any = None, features: dict[str, float] | None = None
    ) -> None:
        """One line of metrics.jsonl, one of progress, and the logging back-ends that the ds_config switched on.

        Args:
            monitor: DeepSpeed's.
            features: see :func:`fastsskd.health.of_features`.
        """
        self.line.log(stage, plan, log, log.step - self._logged_step)
        self._logged_step = log.step
        if not self.is_writer or "loss" not in log.metrics:  # not one good step since the last log
            return
        line = {
            "stage": stage,
            "step": log.step,
            "epoch": log.step / plan.steps_per_epoch,
            "lr": log.lr,
            "grad_norm": log.grad_norm if math.isfinite(log.grad_norm) else None,
            "clips_per_second": log.clips / max(log.seconds, 1e-9),
            "clips": log.clips,
            "seconds": log.seconds,
            "wait": log.wait,
            **{name: value for name in LIVE if math.isfinite(value := getattr(log, name))},
            **health.with_shares(log.metrics),
            **(features or {}),
        }
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if monitor is not None and monitor.enabled:
            numbers = {
                k: v for k, v in line.items() if isinstance(v, (int, float)) and k not in ("step", "clips", "seconds")
            }
            monitor.write_events([(f"{stage}/{name}", value, log.step) for name, value in numbers.items()])
        for problem in self._watch.see(line, plan.warmup_steps):
            self.say(f"{stage}: warning: {problem}")

    def log_picture(self, stage: str, step: int, picture: Path, monitor: Any = None) -> None:
        """Show a picture in TensorBoard too, if the ds_config switched it on."""
        writer = getattr(getattr(monitor, "tb_monitor", None), "summary_writer", None)
        if writer is not None and picture.exists():
            from matplotlib.image import imread

            writer.add_image(f"{stage}/views", imread(picture), step, dataformats="HWC")

    def log_bad_step(self, stage: str, bad: BadStep) -> None:
        """Name the clips of a step that was skipped, and say so."""
        if self.is_writer:
            with open(self.path / BAD_STEPS, "a", encoding="utf-8") as file:
                for suspect in bad.suspects:
                    line = {"stage": stage, "step": bad.step, **suspect, "loss": str(suspect["loss"])}
                    file.write(json.dumps(line) + "\n")
        keys = [key for suspect in bad.suspects for key in suspect["keys"]]
        named = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
        self.say(f"{stage}: skipped step {bad.step}: {bad}; clips in {self.path / BAD_STEPS}: {named}")

    def finish_stage(self, stage: str, metrics: dict[str, Any] | None, skipped: dict[str, str]) -> None:
        """Note that ``stage`` is done, with its evaluation (None after SSL) and the clips left out so far."""
        self._note_skipped(skipped)
        self.progress["stages"][stage] = {"metrics": metrics, **self._stage_summary(stage)}
        self._save_progress()
        if metrics:
            named = {"accuracy": metrics["accuracy"], "mAP": metrics["mAP"]}
            text = ", ".join(f"{name} {value:.3f}" for name, value in named.items() if value is not None)
            self.say(f"{stage}: {text} on {metrics['num_clips']} clips")

    def _stage_summary(self, stage: str) -> dict[str, Any]:
        """Losses and health of the last epoch, speed and waiting of the stage, from metrics.jsonl."""
        if not self.is_writer:
            return {}
        lines = [line for line in read_metrics(self.path) if line["stage"] == stage]
        if not lines:
            return {}
        last = [line for line in lines if line["epoch"] > lines[-1]["epoch"] - 1] or lines[-1:]
        means = {name: _mean(last, name) for name in last[-1] if name not in LINE_FIELDS}
        seconds = sum(line["seconds"] for line in lines)
        return {
            "losses": {name: value for name, value in means.items() if name not in health.NAMES},
            "health": {name: value for name, value in means.items() if name in health.NAMES},
            "clips_per_second": sum(line["clips"] for line in lines) / seconds,
            "wait": sum(line["wait"] * line["seconds"] for line in lines) / seconds,
            "seconds": seconds,
        }

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json; ``result`` gets the seed, the versions and the wall time of this process."""
        result = {
            **result,
            "seed": self.config.run.seed,
            "seconds": time.time() - self._begun,
            "versions": versions(),
            "machine": {"cpu": hardware.cpu_name(), "cores": os.cpu_count()},
        }
        if self.is_writer:
            write_json(self.path / RESULT, result)
        return result

    def fail(self, error: Exception) -> None:
        """Write why the run ended, if the folder is this run's."""
        if self.line is not None:
            self.finish({"status": "failed", "reason": str(error).splitlines()[0] if str(error) else repr(error)})

    def _note_skipped(self, skipped: dict[str, str]) -> None:
        self.progress["skipped"] = {**self.progress.get("skipped", {}), **skipped}

    def _save_progress(self) -> None:
        if self.is_writer:
            write_json(self.path / PROGRESS, self.progress)


def clip_counts(counts: Mapping[str, int | None]) -> str:
    """What a run has to learn from, for people; Multi-SSL is named where its clips are not those of the labels."""
    ssl, train = counts.get("num_ssl"), counts["num_train"]
    other = f" ({ssl} for Multi-SSL)" if ssl not in (None, train) else ""
    return f"{train} training clips{other}, {counts['num_eval']} for evaluation"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return read_lines(path / METRICS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; one that a kill or a full disk cut short is not among them."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _mean(lines: list[dict[str, Any]], name: str) -> float:
    """Over those that have it: features that were not finite have no rank, a resumed run's first lines fewer names."""
    values = [line[name] for line in lines if name in line]
    return sum(values) / len(values)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"fastsskd": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
