"""What is profiled: one stage of a run, made as the run makes it, that leaves nothing behind."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from fastsskd import distributed, ds_config
from fastsskd.answers.stored import StoredAnswers
from fastsskd.config import Config
from fastsskd.datasets import DataSets, open_data
from fastsskd.distill import Distill
from fastsskd.errors import UsageError
from fastsskd.loader import Loader
from fastsskd.manifest import Manifest
from fastsskd.pretrain import Pretrain
from fastsskd.run_folder import RunFolder
from fastsskd.stage_parts import StageParts
from fastsskd.stages import Stage
from fastsskd.teachers import Teacher
from fastsskd.teachers.ours import OwnTeacher


class _NoFolder(RunFolder):
    """Stands where a run's folder would; writes nothing."""

    def __init__(self):
        self.is_writer, self.line = distributed.rank() == 0, None

    @property
    def skip_log(self) -> None:
        return None


class Job:
    """A stage and its parts.

    Args:
        config: the resolved configuration.
        deepspeed_config: as :func:`fastsskd.ds_config.load` read it.
        device: ``"cpu"`` or ``"cuda"``; the process group is up.
        kind: ``"ssl"`` or ``"distill"``; None = the run's first stage of these.

    Attributes:
        stage: that is profiled.
        sizes: of a batch.
        engine: DeepSpeed's, around :attr:`module`.
        teacher: None if the stage has none. One that the run itself would train first has fresh weights here.

    Raises:
        UsageError: the run has no such stage.
        InputError: the data or a teacher cannot be used, as in a run.
    """

    def __init__(self, config: Config, deepspeed_config: dict[str, Any], device: str, kind: str | None = None):
        self.config, self.deepspeed_config = config, deepspeed_config
        self.device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        total = ds_config.batch_sizes(deepspeed_config, distributed.world_size()).total
        self._folder, self._data = _NoFolder(), open_data(config, total)
        self.parts = self._parts(config, self._data)
        self.sizes = self.parts.sizes
        self.stage = choose_stage(self.parts.stages, kind)
        self.teacher = self._teacher()
        drop_path = 0.0 if self.stage.kind == "ssl" else config.model.drop_path
        self.module = self.parts.module(self.stage, self.parts.fresh_model(drop_path), self.teacher)
        self.engine = self._engine(self.module)

    @property
    def clips(self) -> Manifest:
        """That the stage trains on."""
        return self.teacher.manifest if self.is_stored else self.parts.clips(self.stage)

    @property
    def is_stored(self) -> bool:
        return isinstance(self.teacher, StoredAnswers)

    @property
    def needs_waveform(self) -> bool:
        """Whether a batch carries waveforms, for a teacher that hears them."""
        return self.teacher is not None and not self.is_stored

    def loader(self, clips: Manifest | None = None, **changes: Any) -> Loader:
        """The stage's loader, at its beginning, of its clips or others; ``changes`` are fields of ``[data]``."""
        config = dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, **changes))
        data = self._data if clips is None else dataclasses.replace(self._data, ssl=clips, train=clips)
        return self._parts(config, data).loader(self.stage, self.teacher)

    def close(self) -> None:
        self.engine.destroy()

    def _parts(self, config: Config, data: DataSets) -> StageParts:
        return StageParts(config, self.deepspeed_config, data, self.device, self._folder)

    def _teacher(self) -> Teacher | StoredAnswers | None:
        own = {stage.name for stage in self.parts.stages}
        if self.stage.stored or self.stage.teacher not in own:
            return self.parts.teacher(self.stage)
        teacher = OwnTeacher(self.parts.fresh_model(), self.parts.info()).to(self.device)
        self._folder.say(f"{self.stage.name}: its teacher is trained by the run itself; here it has fresh weights")
        return teacher

    def _engine(self, module: Pretrain | Distill) -> Any:
        resolved = ds_config.resolve(self.deepspeed_config, distributed.world_size(), Path())
        for name in ("tensorboard", "wandb", "csv_monitor", "comet"):  # which write
            resolved.pop(name, None)
        engine = self.parts.engine(self.stage, module, resolved)
        engine.train()
        return engine


def choose_stage(stages: list[Stage], kind: str | None) -> Stage:
    """The first of ``kind``, or of the kinds that can be asked for.

    Raises:
        UsageError: there is none.
    """
    kinds = ("ssl", "distill") if kind is None else (kind,)
    found = next((stage for stage in stages if stage.kind in kinds), None)
    if found is None:
        there = ", ".join(dict.fromkeys(stage.kind for stage in stages))
        raise UsageError(f"--stage {kind}: this run has no such stage; recipe.stages names {there}")
    return found


def say(text: str) -> None:
    """Tell people something, once for all ranks."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)
