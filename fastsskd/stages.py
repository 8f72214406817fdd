"""The stages of a run, in order: what each one trains, begins with and learns from."""

from __future__ import annotations

from dataclasses import dataclass

from fastsskd.config import Config


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe.

    Attributes:
        kind: ``"ssl"``, ``"distill"``, or ``"teacher"`` (labels only, for ``distill.teacher = "supervised"``).
        iteration: 1, 2, ...; 0 for the teacher's.
        start: name of the stage whose weights it begins with; None = fresh weights or ``model.init``.
        teacher: name of the stage, or path, of its teacher, or several paths; None = none.
        stored: folder with its teacher's answers, in place of the teacher; "" = none.
    """

    kind: str
    iteration: int
    start: str | None
    teacher: str | tuple[str, ...] | None
    stored: str = ""

    @property
    def name(self) -> str:
        return "teacher" if self.kind == "teacher" else f"iter{self.iteration}-{self.kind}"


def plan_stages(config: Config) -> list[Stage]:
    """The stages of a run, in order."""
    stages, last, last_distilled = [], None, None
    wanted = config.distill.teacher
    if wanted == "supervised" and "distill" in config.recipe.stages:
        stages.append(Stage("teacher", 0, None, None))
    for iteration in range(1, config.recipe.iterations + 1):
        for kind in config.recipe.stages:
            teacher, stored = None, ""
            if kind == "distill":
                stored = config.distill.stored
                teacher = {"": None, "supervised": "teacher", "previous": last_distilled}.get(wanted, wanted)
            stages.append(Stage(kind, iteration, last, teacher, stored))
            last = stages[-1].name
            if kind == "distill":
                last_distilled = last
    return stages
