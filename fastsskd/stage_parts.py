"""What the stages of a run are made of: plan, clips, model, teacher, module, loader and engine of each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

import fastsskd_kernels as kernels
from fastsskd import distributed, ds_config, weights
from fastsskd.answers.stored import StoredAnswers
from fastsskd.augment import vary
from fastsskd.bad_steps import SkippingAdamW
from fastsskd.batch import Batch
from fastsskd.class_map import load_class_map, why_features_only
from fastsskd.config import Config, StageConfig
from fastsskd.datasets import DataSets
from fastsskd.distill import Distill
from fastsskd.engine import StagePlan
from fastsskd.loader import Loader
from fastsskd.manifest import Manifest
from fastsskd.model import ACM, build_model
from fastsskd.pretrain import Pretrain
from fastsskd.run_folder import RunFolder
from fastsskd.sampler import balanced_weights
from fastsskd.schedule import build_optimizer
from fastsskd.stages import Stage, plan_stages
from fastsskd.starting.initialise import initialise, starting_weights
from fastsskd.teachers import Teacher, describe, load_teacher


def varied(config: Config) -> dict[str, Callable[[Batch], Batch]]:
    """The option of :class:`Pretrain` that ``augment.ssl`` asks for."""
    frames = kernels.num_frames(config.num_samples)
    options = {"config": config.augment, "std": config.data.std, "num_frames": frames}
    return {"vary": functools.partial(vary, **options)} if config.augment.ssl else {}


class StageParts:
    """Makes the parts of each stage; nothing is trained here, and nothing written but a report of starting weights.

    Args:
        config: the resolved configuration.
        deepspeed_config: as :func:`fastsskd.ds_config.load` read it.
        data: the clips to train and to evaluate on.
        device: where models and batches live.
        folder: of the run: models of earlier stages, what is said, and the list of skipped clips.

    Attributes:
        stages: of the run, in order.
        sizes: of a batch.
    """

    def __init__(
        self, config: Config, deepspeed_config: dict[str, Any], data: DataSets, device: torch.device, folder: RunFolder
    ):
        self.config, self.deepspeed_config, self.data = config, deepspeed_config, data
        self.device, self.folder = device, folder
        self.stages = plan_stages(config)
        self.sizes = ds_config.batch_sizes(deepspeed_config, distributed.world_size())

    def plan(self, stage: Stage) -> StagePlan:
        """Steps and rates of a stage; the rate falls from one iteration to the next."""
        settings, optim = self.settings(stage), self.config.optim
        per_epoch = len(self.clips(stage)) // self.sizes.total
        decay = self.config.recipe.lr_decay ** max(stage.iteration - 1, 0)
        return StagePlan(
            name=stage.name,
            total_steps=settings.epochs * per_epoch,
            steps_per_epoch=per_epoch,
            warmup_steps=round(settings.warmup_epochs * per_epoch),
            peak_lr=settings.lr * decay,
            schedule=optim.schedule,
            accumulation=self.sizes.accumulation,
            seed=self.seed(stage),
            log_every=self.config.run.log_every,
            max_bad_steps=optim.max_bad_steps,
        )

    def clips(self, stage: Stage) -> Manifest:
        """What a stage trains on."""
        return self.data.ssl if stage.kind == "ssl" else self.data.train

    def settings(self, stage: Stage) -> StageConfig:
        """The section of the configuration that a stage goes by."""
        return self.config.ssl if stage.kind == "ssl" else self.config.distill

    def seed(self, stage: Stage) -> int:
        """Each stage has its own order, crops and masks, all from the run's seed."""
        return kernels.derive_seed(self.config.run.seed, self.stages.index(stage)) % 2**31

    def fresh_model(self, drop_path: float = 0.0) -> ACM:
        """The configuration's model with random weights."""
        options = self.config.model
        return build_model(
            options.size,
            len(self.data.train.classes),
            seconds=self.config.data.seconds,
            drop_path=drop_path,
            activation_checkpointing=options.activation_checkpointing,
            attention=options.attention,
            pooling=options.pooling,
            seed=self.config.run.seed,
        )

    def start_model(self, stage: Stage) -> ACM:
        """The model a stage begins with: the last stage's, or a fresh one, or ``model.init``'s."""
        model = self.fresh_model(drop_path=0.0 if stage.kind == "ssl" else self.config.model.drop_path)
        source = self.folder.model(stage.start) if stage.start else self.config.model.init
        if source:
            self.folder.note_start(stage.name, source, initialise(model, source, self.data.train.classes))
        return model

    def teacher(self, stage: Stage) -> Teacher | StoredAnswers | None:
        """Whom a stage learns from: an earlier stage's model, a checkpoint, a teacher's stored answers, or nobody."""
        if stage.stored:
            return StoredAnswers(stage.stored, self.clips(stage), self.config.data.seconds)
        if stage.teacher is None:
            return None
        names = {other.name for other in self.stages}
        path = self.folder.model(stage.teacher) if stage.teacher in names else stage.teacher
        options = {"classes": self.config.distill.teacher_classes, "multi_label": self.data.train.multi_label}
        return load_teacher(path, **options).to(self.device)

    def module(self, stage: Stage, model: ACM, teacher: Teacher | StoredAnswers | None) -> Pretrain | Distill:
        """What turns a batch into a loss.

        Raises:
            InputError: the student and the teacher do not go together.
        """
        config = self.config
        if stage.kind == "ssl":
            return Pretrain(model, config.loss, config.mask, self.sizes.micro, **varied(config))
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

    def ahead(self, engine: Any) -> Callable[[list[Batch]], list[Batch]]:
        """What becomes of a step's micro-batches before the first of them is trained on."""
        module = engine.module
        if isinstance(module, Distill):
            return module.ask_ahead if self.config.distill.teacher_ahead else list
        if self.sizes.accumulation == 1 or not module.looks_ahead:
            return list

        def look_ahead(batches: list[Batch]) -> list[Batch]:
            with torch.no_grad():
                return engine(batches)

        return look_ahead

    def loader(self, stage: Stage, teacher: Teacher | StoredAnswers | None) -> Loader:
        """This rank's training batches, at their beginning; the caller closes it."""
        data, stored = self.config.data, isinstance(teacher, StoredAnswers)
        clips = teacher.manifest if stored else self.clips(stage)
        sampling = None
        if data.sampling == "weights":
            sampling = clips.weights
        elif data.sampling == "balanced" and stage.kind != "ssl":
            sampling = balanced_weights(clips)
        return Loader(
            clips,
            batch_size=self.sizes.micro,
            seconds=data.seconds,
            train=True,
            seed=self.seed(stage),
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

    def engine(self, stage: Stage, module: Pretrain | Distill, resolved: dict[str, Any]) -> Any:
        """DeepSpeed's engine around ``module``; ``resolved`` is what :func:`fastsskd.ds_config.resolve` gave."""
        import deepspeed

        kind = torch.optim.AdamW if ds_config.zero_stage(self.deepspeed_config) else SkippingAdamW
        optimizer = build_optimizer(module, self.settings(stage), self.config.optim, kind)
        return deepspeed.initialize(model=module.to(self.device), optimizer=optimizer, config=resolved)[0]

    def info(self) -> weights.ModelInfo:
        """What a stage's model file says of itself."""
        data = self.config.data
        return weights.ModelInfo(
            self.config.model.size,
            self.data.train.classes,
            self.data.train.multi_label,
            data.seconds,
            data.mean,
            data.std,
            attention=self.config.model.attention,
            pooling=self.config.model.pooling,
        )

    def try_init(self) -> None:
        """Look into ``model.init``'s file, if a stage is still to begin with it, before the run's folder is claimed."""
        if self.config.model.init and not all(stage.start or self.folder.is_done(stage.name) for stage in self.stages):
            with torch.device("meta"):
                model = self.fresh_model()
            starting_weights(model, self.config.model.init, self.data.train.classes)

    def try_teacher(self) -> None:
        """Load a teacher from outside and let it hear silence: a wrong one is found before days of Multi-SSL."""
        names = {None, *(stage.name for stage in self.stages)}
        for stage in [stage for stage in self.stages if stage.stored or stage.teacher not in names][:1]:
            teacher = self.teacher(stage)
            self.folder.say(f"{stage.name}: {'stored answers' if stage.stored else 'teacher'} with {describe(teacher)}")
            if not stage.stored:
                teacher(torch.zeros(1, self.config.num_samples, device=self.device))
            with torch.device("meta"):
                model = self.fresh_model()
            self.module(stage, model, teacher)  # raises if the two do not go together
