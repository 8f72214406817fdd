"""The recipe: Multi-SSL, then supervised learning with distillation, iterated (Algorithm A1), evaluated, ensembled."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

import fastsskd_kernels as kernels
from fastsskd import checkpoint, distributed, ds_config, engine_state, weights
from fastsskd.alive import Watchdog
from fastsskd.bad_steps import BadStep, SkippingAdamW
from fastsskd.class_map import load_class_map, why_features_only
from fastsskd.config import Config, StageConfig
from fastsskd.datasets import open_data
from fastsskd.distill import Distill
from fastsskd.engine import Log, StagePlan, StopFlag, Stopped, train_stage
from fastsskd.errors import InputError, SharedError
from fastsskd.evaluate import mean_scores, summarise
from fastsskd.figures import draw_views
from fastsskd.loader import Loader
from fastsskd.manifest import Manifest
from fastsskd.model import ACM, build_model
from fastsskd.pretrain import Pretrain
from fastsskd.run_folder import RunFolder
from fastsskd.sampler import balanced_weights
from fastsskd.schedule import build_optimizer
from fastsskd.selection import Selection
from fastsskd.stages import Stage, plan_stages
from fastsskd.starting import initialise, starting_weights
from fastsskd.stored_answers import StoredAnswers
from fastsskd.teachers import Teacher, describe, load_teacher


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
        self.stages = plan_stages(config)
        self.data = open_data(config, self.sizes.total)
        self._try_init()
        self._try_teacher()
        self.stop = StopFlag()
        self.watchdog = Watchdog(config.run.timeout, self._give_up)
        self.skipped: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Train every stage that is not done yet, evaluate, and write ``result.json``; returns its contents."""
        resolved = ds_config.resolve(self.deepspeed_config, distributed.world_size(), self.folder.tensorboard)
        steps = {stage.name: self._plan(stage).total_steps for stage in self.stages}
        self.folder.begin(steps, resolved, len(self.data.train), len(self.data.evaluation))
        self._say_size()
        for stage in self.stages:
            if self.folder.is_done(stage.name):
                self.folder.say(f"{stage.name}: done before, not trained again")
                continue
            selected = self.folder.trained(stage.name) or self._train(stage, resolved)
            metrics = None if stage.kind == "ssl" else {**self.evaluate([stage]), "weights": selected}
            self.folder.finish_stage(stage.name, metrics, self.skipped)
        return self._finish()

    def _say_size(self) -> None:
        with torch.device("meta"):
            parts = self._fresh_model().num_parameters()
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
            "num_train": len(self.data.train),
            "num_eval": len(self.data.evaluation),
            "skipped": self.skipped,
        }
        return self.folder.finish(result)

    def evaluate(self, stages: list[Stage]) -> dict[str, Any]:
        """Metrics of one stage's model, or of the mean of several models' probabilities, on the evaluation set."""
        return self._score(weights.load_model(self.folder.model(stage.name), self.device) for stage in stages)

    def _score(self, models: Iterable[tuple[ACM, weights.ModelInfo]], stoppable: bool = True) -> dict[str, Any]:
        clips, workers = self.data.evaluation, self.config.data.workers
        options = {"device": self.device, "workers": workers, "skip_log": self.folder.skip_log}
        watched = ((self._watched(model, stoppable), info) for model, info in models)
        scores = mean_scores(watched, clips, self.sizes.micro, **options)
        self.skipped.update(scores.skipped)
        return summarise(scores.probs, scores, clips)

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
        info = self._info()
        model = weights.fresh_model(info)
        model.load_state_dict(state)
        return self._score([(model.to(self.device).eval(), info)], stoppable=False)

    def _plan(self, stage: Stage) -> StagePlan:
        settings, optim = self._settings(stage), self.config.optim
        per_epoch = len(self._clips(stage)) // self.sizes.total
        decay = self.config.recipe.lr_decay ** max(stage.iteration - 1, 0)
        return StagePlan(
            name=stage.name,
            total_steps=settings.epochs * per_epoch,
            steps_per_epoch=per_epoch,
            warmup_steps=round(settings.warmup_epochs * per_epoch),
            peak_lr=settings.lr * decay,
            schedule=optim.schedule,
            accumulation=self.sizes.accumulation,
            seed=self._seed(stage),
            log_every=self.config.run.log_every,
            max_bad_steps=optim.max_bad_steps,
        )

    def _clips(self, stage: Stage) -> Manifest:
        return self.data.ssl if stage.kind == "ssl" else self.data.train

    def _settings(self, stage: Stage) -> StageConfig:
        return self.config.ssl if stage.kind == "ssl" else self.config.distill

    def _seed(self, stage: Stage) -> int:
        """Each stage has its own order, crops and masks, all from the run's seed."""
        return kernels.derive_seed(self.config.run.seed, self.stages.index(stage)) % 2**31

    def _train(self, stage: Stage, resolved: dict[str, Any]) -> dict[str, Any]:
        """Train one stage and save its model; returns which weights were kept."""
        import deepspeed

        plan = self._plan(stage)
        teacher = self._teacher(stage)
        module = self._module(stage, self._start_model(stage), teacher)
        untrained = {n: p.detach().clone() for n, p in module.model.named_parameters() if not p.requires_grad}
        loader = self._loader(stage, teacher)
        self.folder.say(f"{stage.name}: loads {loader.describe()}")
        optimizer = build_optimizer(module, self._settings(stage), self.config.optim)
        if ds_config.zero_stage(self.deepspeed_config) == 0:
            optimizer = SkippingAdamW(optimizer.param_groups)
        engine, *_ = deepspeed.initialize(model=module.to(self.device), optimizer=optimizer, config=resolved)
        selection = Selection(self.config.distill, self._evaluate_state)
        start = self._resume(stage, engine, loader, selection)
        self.folder.begin_stage(stage.name, start)

        def on_log(log: Log) -> None:
            self.folder.log(stage.name, plan, log, engine.monitor)

        last_bad = 0

        def on_bad(bad: BadStep) -> None:
            nonlocal last_bad
            last_bad = bad.step
            self.folder.log_bad_step(stage.name, bad)

        def on_step(step: int, stopping: bool) -> None:
            epoch, inside = divmod(step, plan.steps_per_epoch)
            if not inside and stage.kind == "distill" and selection.wants(epoch):
                selection.add(epoch, engine_state.full_state(engine, untrained))
                engine.train()
            every = self.config.run.checkpoint_every
            due = every and step % every == 0 and step < plan.total_steps
            # Not in the midst of bad steps: a resume goes back to before them.
            if stopping or (due and step != last_bad):
                self._save(stage, engine, step, loader, selection)
            self.watchdog.beat()

        hooks = {"stop": self.stop, "on_log": on_log, "on_step": on_step, "on_bad": on_bad}
        try:
            with self.watchdog if distributed.world_size() > 1 else contextlib.nullcontext():
                train_stage(engine, loader, plan, start_step=start, **hooks)
        finally:
            self.skipped.update(loader.skipped)
            loader.close()
        state = selection.result(engine_state.full_state(engine, untrained))
        model, is_first = self.folder.model(stage.name), distributed.rank() == 0
        checkpoint.write_together(lambda: weights.save_model(model, state, self._info()) if is_first else None, model)
        if is_first and stage.kind == "ssl":
            draw_views(model, self.data.evaluation, self.config.mask, self.folder.plots)
        engine.destroy()
        distributed.barrier()
        self.folder.note_trained(stage.name, selection.note, self.skipped)
        return selection.note

    def _fresh_model(self, drop_path: float = 0.0) -> ACM:
        options = self.config.model
        return build_model(
            options.size,
            len(self.data.train.classes),
            seconds=self.config.data.seconds,
            drop_path=drop_path,
            activation_checkpointing=options.activation_checkpointing,
            attention=options.attention,
            seed=self.config.run.seed,
        )

    def _start_model(self, stage: Stage) -> ACM:
        """The model a stage begins with: the last stage's, or a fresh one, or ``model.init``'s."""
        model = self._fresh_model(drop_path=0.0 if stage.kind == "ssl" else self.config.model.drop_path)
        source = self.folder.model(stage.start) if stage.start else self.config.model.init
        if source:
            self.folder.note_start(stage.name, source, initialise(model, source, self.data.train.classes))
        return model

    def _try_init(self) -> None:
        """Look into ``model.init``'s file, if a stage is still to begin with it, before the run's folder is claimed."""
        if self.config.model.init and not all(stage.start or self.folder.is_done(stage.name) for stage in self.stages):
            with torch.device("meta"):
                model = self._fresh_model()
            starting_weights(model, self.config.model.init, self.data.train.classes)

    def _teacher(self, stage: Stage) -> Teacher | StoredAnswers | None:
        if stage.stored:
            return StoredAnswers(stage.stored, self._clips(stage), self.config.data.seconds)
        if stage.teacher is None:
            return None
        names = {other.name for other in self.stages}
        path = self.folder.model(stage.teacher) if stage.teacher in names else stage.teacher
        options = {"classes": self.config.distill.teacher_classes, "multi_label": self.data.train.multi_label}
        return load_teacher(path, **options).to(self.device)

    def _try_teacher(self) -> None:
        """Load a teacher from outside and let it hear silence: a wrong one is found before days of Multi-SSL."""
        names = {None, *(stage.name for stage in self.stages)}
        for stage in [stage for stage in self.stages if stage.stored or stage.teacher not in names][:1]:
            teacher = self._teacher(stage)
            self.folder.say(f"{stage.name}: {'stored answers' if stage.stored else 'teacher'} with {describe(teacher)}")
            if not stage.stored:
                teacher(torch.zeros(1, self.config.num_samples, device=self.device))
            with torch.device("meta"):
                model = self._fresh_model()
            self._module(stage, model, teacher)  # raises if the two do not go together

    def _module(self, stage: Stage, model: ACM, teacher: Teacher | StoredAnswers | None) -> Pretrain | Distill:
        config = self.config
        if stage.kind == "ssl":
            return Pretrain(model, config.loss, config.mask, slots=self.sizes.micro)
        distill = config.distill
        if stage.kind == "teacher" or teacher is None:
            distill = dataclasses.replace(distill, labels=True)
        module = Distill(
            model,
            classes=self.data.train.classes,
            multi_label=self.data.train.multi_label,
            distill=distill,
            augmentation=config.augment,
            data=config.data,
            num_frames=kernels.num_frames(config.num_samples),
            teacher=teacher,
            class_map=load_class_map(distill.class_map) if teacher is not None else None,
        )
        if teacher is not None and not stage.stored and distill.teacher_labels and not module.uses_scores:
            reason = why_features_only(self.data.train.classes, teacher.classes, load_class_map(distill.class_map))
            self.folder.say(f"{stage.name}: the teacher gives features only: {reason}")
        return module

    def _loader(self, stage: Stage, teacher: Teacher | StoredAnswers | None) -> Loader:
        data, stored = self.config.data, isinstance(teacher, StoredAnswers)
        clips = teacher.manifest if stored else self._clips(stage)
        sampling = None
        if data.sampling == "weights":
            sampling = clips.weights
        elif data.sampling == "balanced" and clips.classes:
            sampling = balanced_weights(clips)
        return Loader(
            clips,
            batch_size=self.sizes.micro,
            seconds=data.seconds,
            train=True,
            seed=self._seed(stage),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            device=self.device,
            workers=data.workers,
            prefetch=data.prefetch,
            waveform=teacher is not None and not stored,
            crops=teacher if stored else None,
            mean=data.mean,
            std=data.std,
            drop_last_to=self.sizes.total,
            weights=sampling,
            max_bad_share=data.max_bad_share,
            max_bad=data.max_bad if data.max_bad >= 0 else None,
            skip_log=self.folder.skip_log,
        )

    def _info(self) -> weights.ModelInfo:
        data = self.config.data
        return weights.ModelInfo(
            self.config.model.size,
            self.data.train.classes,
            self.data.train.multi_label,
            data.seconds,
            data.mean,
            data.std,
            attention=self.config.model.attention,
        )

    def _save(self, stage: Stage, engine: Any, step: int, loader: Loader, selection: Selection) -> None:
        done = sum(self._plan(s).total_steps for s in self.stages[: self.stages.index(stage)])
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
