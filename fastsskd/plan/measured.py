"""Costs that were measured, in memory and in the file that ``fastsskd plan --gpu this --json`` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fastsskd.errors import InputError
from fastsskd.plan.cost import StageCost


@dataclass(frozen=True)
class Measured:
    """What was measured, with the settings it belongs to.

    Attributes:
        device: name. cores: of the machine. memory: bytes of the GPU, or else of the machine.
        size, seconds, precision: model, clip length and arithmetic of the steps.
        base: bytes a process holds besides the plan's count, without a GPU.
        loader_seconds: CPU seconds of a clip; None = not measured.
        beside: seconds that loading a clip adds to a step, without a GPU: the model's threads wait for each other, and
            the loader takes their cores one by one; None = not measured.
        spread: of the timings of one step between their quartiles, as a share of their median, at the worst.
        stages: by kind, see :class:`~fastsskd.plan.cost.StageCost`.
    """

    device: str
    on_gpu: bool
    cores: int
    memory: float
    size: str
    seconds: float
    precision: str
    base: float
    loader_seconds: float | None
    beside: float | None
    spread: float
    stages: Mapping[str, StageCost]


def load(path: str | Path) -> Measured:
    """Read the costs that ``fastsskd plan --gpu this --json`` printed.

    Raises:
        InputError: absent, or something else.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        tree = tree.get("measured") or tree
        stages = {kind: StageCost(**{k: float(v) for k, v in cost.items()}) for kind, cost in tree["stages"].items()}
        found = Measured(**{**tree, "stages": stages})
        numbers = [found.cores, found.memory, found.base, found.seconds, found.spread]
        numbers += [value for value in (found.loader_seconds, found.beside) if value is not None]
        numbers += [value for cost in stages.values() for value in asdict(cost).values()]
        if not stages or min(float(number) for number in numbers) < 0 or found.cores < 1:
            raise ValueError("a figure is missing or negative")
        return found
    except OSError as error:
        raise InputError(
            f"--measured {path}: {error.strerror}; make it with `fastsskd plan --gpu this --json`"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--measured {path}: not what `fastsskd plan --gpu this --json` printed ({str(error)[:80]}); make it anew"
        ) from None
