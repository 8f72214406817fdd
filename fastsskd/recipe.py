"""The recipe: Multi-SSL, then supervised learning with distillation, iterated (Algorithm A1), evaluated, ensembled."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastsskd import checkpoint, distributed, ds_config, engine_state, health, peak, weights
from fastsskd.alive import Watchdog
from fastsskd.bad_steps import BadStep, GradientWatch
from fastsskd.config import Config
from fastsskd.datasets import open_data
from fastsskd.engine import Log, StagePlan, StopFlag, Stopped, train_stage
from fastsskd.errors import InputError, SharedError
from fastsskd.evaluation import score_file
from fastsskd.evaluation.evaluate import clip_scores, mean_scores, summarise
from fastsskd.figures import draw_views
from fastsskd.loader import Loader
from fastsskd.model import ACM
from fastsskd.moving_average import MovingAverage
from fastsskd.run_folder import COUNTS, RunFolder
from fastsskd.selection import Selection
from fastsskd.stage_parts import StageParts
from fastsskd.stages import Stage


class Recipe:
    """A run: data, stages, and what they leave in the run's folder.

    Args:
        config: the resolved configuration.
        deepspeed_config: as :func:`fastsskd.ds_config.load` read it.
        device: ``"cpu"`` or ``"cuda"``; the process group is up.
        folder: the run's folder, already claimed.
    """

    def __init__(self, config: Config, deepspeed_config: dict[str, Any], device: str, folder: RunFolder):
        self.config, self.folder = config, folder
        self.device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        self.sizes = ds_config.batch_sizes(deepspeed_config, distributed.world_size())
        self.deepspeed_config = deepspeed_config
        self.data = open_data(config, self.sizes.total)
        self.parts = StageParts(config, deepspeed_config, self.data, self.device, folder)
        self.stages = self.parts.stages
        self.parts.try_init()
        self.parts.try_teacher()
        self.stop = StopFlag()
        self.watchdog = Watchdog(config.run.timeout, self._give_up)
        self.skipped: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Train every stage that is not done yet, evaluate, and write ``result.json``; returns its contents."""
        resolved = ds_config.resolve(self.deepspeed_config, distributed.world_size(), self.folder.tensorboard)
        steps = {stage.name: self.parts.plan(stage).total_steps for stage in self.stages}
        self.folder.begin(steps, resolved, self._counts())
        self._say_size()
        for stage in self.stages:
            if self.folder.is_done(stage.name):
                self.folder.say(f"{stage.name}: done before, not trained again")
                continue
            selected = self.folder.trained(stage.name) or self._train(stage, resolved)
            metrics = None if stage.kind == "ssl" else {**self.evaluate([stage]), "weights": selected}
            self.folder.finish_stage(stage.name, metrics, self.skipped)
        return self._finish()

    def _counts(self) -> dict[str, int | None]:
        ssl = len(self.data.ssl) if any(stage.kind == "ssl" for stage in self.stages) else None
        return dict(zip(COUNTS, (ssl, len(self.data.train), len(self.data.evaluation)), strict=True))

    def _say_size(self) -> None:
        with torch.device("meta"):
            parts = self.parts.fresh_model().num_parameters()
        text = ", ".join(f"{part} {count:,}" for part, count in parts.items())
        self.folder.say(f"model {self.config.model.size}: {parts.total:,} parameters ({text})")

    def _finish(self) -> dict[str, Any]:
        done = self.folder.progress["stages"]
        self.skipped.update(self.folder.progress.get("skipped", {}))  # of the stages before a resume
        for skipped in distributed.gather_objects(self.skipped):
            self.skipped.update(skipped)
        iterations = []
        for number in range(1, self.config.recipe.iterations + 1):
            own = {stage.kind: done[stage.name] for stage in self.stages if stage.iteration == number}
            iterations.append({"iteration": number, **own, "metrics": own.get("distill", {}).get("metrics")})
        distilled = [stage for stage in self.stages if stage.kind == "distill"]
        ensemble = self.evaluate(distilled) if len(distilled) > 1 else None
        result = {
            "status": "complete",
            "iterations": iterations,
            "teacher": done.get("teacher"),
            "ensemble": ensemble,
            "metrics": iterations[-1]["metrics"],
            "num_clips": len(self.data.train) + len(self.data.evaluation),
            **self._counts(),
            "skipped": self.skipped,
        }
        return self.folder.finish(result)

    def evaluate(self, stages: list[Stage]) -> dict[str, Any]:
        """Metrics of one stage's model, or of the mean of several models' probabilities, on the evaluation set."""
        models = (weights.load_model(self.folder.model(stage.name), self.device) for stage in stages)
        return self._score(models, stages[0].name if len(stages) == 1 else "ensemble")

    def _score(self, models: Iterable[tuple[ACM, weights.ModelInfo]], name: str, stoppable: bool = True) -> dict:
        """Metrics on the evaluation set; the clips' probabilities go to a file of this ``name``, if it has one."""
        clips, workers = self.data.evaluation, self.config.data.workers
        options = {"device": self.device, "workers": workers, "skip_log": self.folder.skip_log}
        watched = ((self._watched(model, stoppable), info) for model, info in models)
        scores = mean_scores(watched, clips, self.sizes.micro, **options)
        self.skipped.update(scores.skipped)
        metrics, file = summarise(scores.probs, scores, clips), self.folder.scores / f"{name}.npz"
        if name:
            write = functools.partial(score_file.save, file, clip_scores(scores, clips))
            checkpoint.write_together(write if distributed.rank() == 0 else lambda: None, file)
        return metrics

    def _watched(self, model: ACM, stoppable: bool) -> Callable[[torch.Tensor], Any]:
        """``model``, but each batch is progress, and before it all ranks stop if one of them was asked to."""

        def forward(fbank: torch.Tensor) -> Any:
            self.watchdog.beat()
            if stoppable and any(asked for (asked,) in distributed.gather_numbers([int(self.stop.set)])):
                raise Stopped("stopped while evaluating")
            return model(fbank)

        return forward

    def _evaluate_state(self, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Metrics of weights in memory, on the evaluation set; in the midst of training, which alone can save."""
        info = self.parts.info()
        model = weights.fresh_model(info)
        model.load_state_dict(state)
        return self._score([(model.to(self.device).eval(), info)], "", stoppable=False)

    def _measured(self, plan: StagePlan, stage: Stage, teacher: Any) -> StagePlan:
        """The plan of a stage, with what its steps compute and this machine could."""
        precision, classes = ds_config.precision(self.deepspeed_config), len(self.data.train.classes)
        return dataclasses.replace(
            plan, **peak.of_stage(self.config, stage.kind, classes, teacher, self.device, precision)
        )

    def _train(self, stage: Stage, resolved: dict[str, Any]) -> dict[str, Any]:
        """Train one stage and save its model; returns which weights were kept."""
        teacher = self.parts.teacher(stage)
        plan = self._measured(self.parts.plan(stage), stage, teacher)
        module = self.parts.module(stage, self.parts.start_model(stage), teacher)
        untrained = {n: p.detach().clone() for n, p in module.model.named_parameters() if not p.requires_grad}
        loader = self.parts.loader(stage, teacher)
        self.folder.say(f"{stage.name}: loads {loader.describe()}")
        engine = self.parts.engine(stage, module, resolved)
        selection = Selection(self.config.distill, self._evaluate_state)
        decay = self.config.distill.ema if stage.kind != "ssl" else 0.0
        if decay:
            engine_state.keep_average(engine)
        start = self._resume(stage, engine, loader, selection)
        average = MovingAverage(engine, decay) if decay else None
        self.folder.begin_stage(stage.name, start)

        def current() -> dict[str, torch.Tensor]:
            with average.in_place() if average else contextlib.nullcontext():
                return engine_state.full_state(engine, untrained)

        last_bad = 0

        def on_bad(bad: BadStep) -> None:
            nonlocal last_bad
            last_bad = bad.step
            self.folder.log_bad_step(stage.name, bad)

        def on_step(step: int, stopping: bool) -> None:
            if average:
                average.update()
            epoch, inside = divmod(step, plan.steps_per_epoch)
            if not inside and stage.kind == "distill" and selection.wants(epoch):
                selection.add(epoch, current())
                engine.train()
            if self._draws_after(stage, plan, step):
                self._draw(stage, step, f"-epoch{epoch:03d}", current(), engine.monitor)
            # Not in the midst of bad steps: a resume goes back to before them.
            if stopping or (self._saves_after(plan, step) and step != last_bad):
                self._save(stage, engine, step, loader, selection)
            self.watchdog.beat()

        on_log = functools.partial(self._log, stage, plan, module, engine.monitor)
        hooks = {"stop": self.stop, "on_log": on_log, "on_step": on_step, "on_bad": on_bad}
        hooks["watch"] = GradientWatch(module.model.patch_embed)
        try:
            with self.watchdog if distributed.world_size() > 1 else contextlib.nullcontext():
                train_stage(engine, loader, plan, start_step=start, prepare=self.parts.ahead(engine), **hooks)
        finally:
            self.skipped.update(loader.skipped)
            loader.close()
        self._export(stage, selection.result(current()), plan.total_steps, engine.monitor)
        engine.destroy()
        distributed.barrier()
        self.folder.note_trained(stage.name, selection.note, self.skipped)
        return selection.note

    def _export(self, stage: Stage, state: dict[str, torch.Tensor], step: int, monitor: Any) -> None:
        """Write the model that a stage leaves behind; after Multi-SSL also a picture."""
        model, info, is_first = self.folder.model(stage.name), self.parts.info(), distributed.rank() == 0
        checkpoint.write_together(lambda: weights.save_model(model, state, info) if is_first else None, model)
        if stage.kind == "ssl":
            self._draw(stage, step, "", state, monitor)

    def _log(self, stage: Stage, plan: StagePlan, module: torch.nn.Module, monitor: Any, log: Log) -> None:
        features = health.of_features(module.pooled) if stage.kind == "ssl" else {}
        self.folder.log(stage.name, plan, log, monitor, features)

    def _saves_after(self, plan: StagePlan, step: int) -> bool:
        """Whether a checkpoint is due; at a stage's end its model is written instead."""
        every = self.config.run.checkpoint_every
        return every > 0 and step % every == 0 and step < plan.total_steps

    def _draws_after(self, stage: Stage, plan: StagePlan, step: int) -> bool:
        """Whether a picture is due in the midst of a stage: ``run.pictures_every``."""
        epoch, inside = divmod(step, plan.steps_per_epoch)
        every = self.config.run.pictures_every if stage.kind == "ssl" and step < plan.total_steps else 0
        return bool(every) and not inside and epoch % every == 0

    def _draw(self, stage: Stage, step: int, suffix: str, state: dict[str, torch.Tensor], monitor: Any) -> None:
        """Draw what the model makes of a clip, the same one each time; the first rank does it, the others wait."""
        if distributed.rank() == 0:
            info, picture = self.parts.info(), self.folder.plots / f"{stage.name}-views{suffix}.png"
            model = weights.fresh_model(info)
            model.load_state_dict(state)
            draw_views(model.eval(), info, self.data.evaluation, self.config.mask, picture)
            self.folder.log_picture(stage.name, step, picture, monitor)

    def _save(self, stage: Stage, engine: Any, step: int, loader: Loader, selection: Selection) -> None:
        done = sum(self.parts.plan(s).total_steps for s in self.stages[: self.stages.index(stage)])
        progress = checkpoint.Progress(
            stage=stage.name,
            step=step,
            global_step=done + step,
            loader=loader.state_dict(),
            batch_size=self.sizes.total,
            world_size=distributed.world_size(),
            zero_stage=ds_config.zero_stage(self.deepspeed_config),
            precision=ds_config.precision(self.deepspeed_config),
            note=selection.note,
        )
        checkpoint.save(engine, self.folder.checkpoints, progress, self.config.run.keep_checkpoints, selection.kept)

    def _resume(self, stage: Stage, engine: Any, loader: Loader, selection: Selection) -> int:
        """Load the stage's newest checkpoint, if this run resumes and has one; the step to start from."""
        found = checkpoint.newest(self.folder.checkpoints, stage.name) if self.folder.resumed else None
        if found is None:
            return 0
        path, progress = found
        if progress.batch_size != self.sizes.total:
            raise SharedError(
                f"checkpoint {path}: written with train_batch_size {progress.batch_size}, this run has "
                f"{self.sizes.total}; resume with the same total, split over ranks and accumulation as you like"
            )
        selection.kept, selection.note = checkpoint.restore(engine, path), progress.note
        loader.load_state_dict(progress.loader)
        self.folder.say(
            f"{stage.name}: continues from step {progress.step} ({path.name}, written by {progress.world_size} "
            f"rank(s), ZeRO {progress.zero_stage}, {progress.precision})"
        )
        return progress.step

    def _give_up(self) -> None:
        """End this process, whose main thread waits for another rank, and will for long."""
        error = InputError(
            f"rank {distributed.rank()}: no step for {self.config.run.timeout} s (run.timeout): another rank, or a "
            "disk, stands still; --resume continues from the last checkpoint"
        )
        self.folder.fail(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
