"""How much of the machine's arithmetic a step uses: its operations by the shapes, and what the machine could do."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsskd import distributed, flops, hardware
from fastsskd.config import Config
from fastsskd.teachers.ensemble import Ensemble
from fastsskd.teachers.ours import OwnTeacher
from fastsskd_kernels.product import fits, product

_SIDE = 1024  # of the matrices that are multiplied where no data sheet is known
_SECONDS, _LEAST = 0.2, 8
"""Of the trial: so long, and so many products at least. The first one is not counted: it prepares the others, and in
0.05 s with the first among them a busy machine's peak came out at a third of what its own steps then reached."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@functools.lru_cache(maxsize=8)
def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of dense matrix products: of the card's data sheet, or as this machine does them just now.

    Draws no random numbers. A measured peak is what a large product reaches here, torch's or ours, not what the maker
    promises.

    Args:
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    """
    if device.type == "cuda":
        known = hardware.find(torch.cuda.get_device_name(device))
        if known is not None:
            return known.matrix32 if precision == "fp32" else known.matrix16
    matrix = torch.ones(_SIDE, _SIDE, dtype=DTYPES[precision], device=device)
    peak = _rate(operator.matmul, matrix, matrix)
    tall = matrix.repeat(4, 1)
    if device.type == "cpu" and precision == "bf16" and fits(*tall.shape, _SIDE):
        peak = max(peak, _rate(product, tall, matrix))
    return peak


def _rate(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """FLOP/s of the quickest of many products."""

    def once() -> float:
        begin = time.perf_counter()
        multiply(a, b)
        if a.device.type == "cuda":
            torch.cuda.synchronize(a.device)
        return time.perf_counter() - begin

    once()
    times, end = [], time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(times) < _LEAST:
        times.append(once())
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1] / min(times)


def clip_flops(config: Config, kind: str, classes: int, teacher: Any = None) -> float:
    """Operations of a clip in a step of a stage of ``kind``; a teacher of another project counts as a base-size one."""
    seconds, head = config.data.seconds, {"frozen": config.distill.frozen, "pooling": config.model.pooling}
    if kind == "ssl":
        mask = config.mask
        options = {"inter_ratio": mask.inter_ratio, "clones": mask.clones, "raw_gradient": config.loss.raw_gradient}
        return flops.pretrain_step(config.model.size, seconds, **options).total
    total = flops.distill_step(config.model.size, classes, seconds, **head).total
    for member in teacher.members if isinstance(teacher, Ensemble) else [teacher]:
        if callable(member):  # stored answers are not asked
            size = member.info.size if isinstance(member, OwnTeacher) else "base"
            total += flops.distill_step(config.model.size, classes, seconds, teacher=size).teacher
    return total


def of_stage(config: Config, kind: str, classes: int, teacher: Any, device: torch.device, precision: str) -> dict:
    """``clip_flops`` and ``peak_flops`` of an :class:`fastsskd.engine.StagePlan`, all ranks' devices being alike."""
    peak = peak_flops(device, precision) * distributed.world_size()
    return {"clip_flops": clip_flops(config, kind, classes, teacher), "peak_flops": peak}
