"""A DeepSpeed engine's state as safetensors, for any number of ranks, ZeRO stage and precision.

Whatever the stage, a rank trains stretches of the flattened parameters in float32: their master weights, AdamW's two
moments, and the weights' moving average if a stage keeps one. Each rank writes its own stretches, and on resume reads
those it now holds, wherever they were written: nothing is gathered, no rank needs memory for more than its share, and
nothing is unpickled.

    engine-00001-of-00004.safetensors     "master@1024/model.pos_embed", "exp_avg@1024/...", "exp_avg_sq@1024/...", ...

DeepSpeed's own way from one number of ranks to another, its universal checkpoints, is a conversion by hand, of pickles.
This file knows some of DeepSpeed's insides by name; setup.py pins its version.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsskd import distributed
from fastsskd.errors import InputError, SharedError

MASTER, MOMENTS, AVERAGE = "master", ("exp_avg", "exp_avg_sq"), "ema"
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class Stretch:
    """Elements ``start`` to ``start + n`` of the flattened parameter ``name``, as this rank trains them.

    ``values`` holds the master weights, the moments and the average by name, each ``(n,)`` float32: views of the live
    state.
    """

    name: str
    start: int
    values: dict[str, Tensor]

    def part(self, begin: int, end: int) -> Stretch:
        """Elements ``begin`` to ``end`` of this stretch."""
        return Stretch(self.name, self.start + begin, {kind: v[begin:end] for kind, v in self.values.items()})


def save(engine: Any, folder: Path) -> Path:
    """Write this rank's share of the engine's state into ``folder``; returns the file. No rank waits for another."""
    rank, ranks = distributed.rank(), distributed.world_size()
    own = _stretches(engine)
    if engine.zero_optimization_stage() == 0:  # every rank holds everything
        sizes = [len(stretch.values[MASTER]) for stretch in own]
        own = [s.part(n * rank // ranks, n * (rank + 1) // ranks) for s, n in zip(own, sizes, strict=True)]
    values = {
        f"{kind}@{stretch.start}/{stretch.name}": value.detach()
        for stretch in own
        for kind, value in stretch.values.items()
        if len(value)
    }
    file = folder / f"engine-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    save_file(values, file)
    return file


def describe(engine: Any) -> dict[str, Any]:
    """What is no tensor: sizes of the parameters, steps done, and the state of a dynamic loss scale."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    dynamic = scaler is not None and scaler.dynamic
    return {
        "parameters": _sizes(engine),
        "optimizer_steps": optimizer_steps(engine),
        **{name: getattr(engine, name) for name in _COUNTERS},
        "loss_scale": {name: getattr(scaler, name) for name in _SCALER_FIELDS} if dynamic else None,
    }


def load(engine: Any, files: list[Path], about: dict[str, Any]) -> None:
    """Set the engine to a saved state; every rank must call it.

    Args:
        engine: with any number of ranks, ZeRO stage and precision, over the same trainable parameters.
        files: those of every rank that saved.
        about: what :func:`describe` said then.

    Raises:
        InputError: other parameters than the engine's, or a part of them is in no file.
    """
    _check_same_parameters(engine, about["parameters"])
    partitioned = engine.zero_optimization_stage() == 3
    if partitioned:
        engine.optimizer.checkpoint_event_prologue()
    own = _stretches(engine, about["optimizer_steps"])
    with ExitStack() as stack, torch.no_grad():
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        pieces = _pieces(opened)
        if AVERAGE not in {kind for kind, _ in pieces} and any(AVERAGE in stretch.values for stretch in own):
            raise SharedError("it holds no moving average of the weights; resume with the run's own distill.ema")
        for stretch in own:
            for kind, value in stretch.values.items():
                _fill(value, stretch, kind, pieces[kind, stretch.name])
        _refresh_model(engine)
    if partitioned:
        engine.optimizer.checkpoint_event_epilogue()
    for name in _COUNTERS:
        setattr(engine, name, about[name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if about["loss_scale"] and scaler is not None and scaler.dynamic:
        for name, value in about["loss_scale"].items():
            setattr(scaler, name, value)


def full_state(engine: Any, untrained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's whole float32 state on the CPU, from ZeRO's partitions; every rank must call it.

    Args:
        untrained: the parameters this stage left alone, from before the engine rounded them to 16 bit.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in engine.module.model.named_parameters():
        if name in untrained:
            state[name] = untrained[name].cpu()
            continue
        full = (
            safe_get_full_fp32_param(parameter)
            if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
            else None
        )
        state[name] = (parameter.detach() if full is None else full).float().cpu().clone()
    bad = [name for name, value in state.items() if not math.isfinite(float(value.abs().max()))]
    if bad:
        raise SharedError(
            f"the weights are not finite ({bad[0]}); lower the learning rate; the last checkpoint is untouched"
        )
    return state


def _trained(engine: Any) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _sizes(engine: Any) -> dict[str, int]:
    """Elements of each trainable parameter; ZeRO-3 leaves empty placeholders, which know their whole size."""
    return {name: getattr(p, "ds_numel", p.numel()) for name, p in _trained(engine)}


def _held(engine: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """The AdamW inside, and the float32 tensors of this rank that it updates: flat partitions under ZeRO."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return optimizer, [p for _, p in _trained(engine)]
    if stage == 3:
        return optimizer.optimizer, list(optimizer.fp32_partitioned_groups_flat)
    return optimizer.optimizer, [p for group in optimizer.optimizer.param_groups for p in group["params"]]


def optimizer_steps(engine: Any) -> int:
    """Steps that AdamW has done: those of the engine less the skipped ones."""
    adam, held = _held(engine)
    return max((int(adam.state[p]["step"]) for p in held if adam.state[p]), default=0)


def keep_average(engine: Any) -> None:
    """Make room for a moving average of the weights, equal to them at first; AdamW leaves it alone."""
    _prepare_moments(engine, None)
    adam, held = _held(engine)
    for p in held:
        adam.state[p][AVERAGE] = p.detach().clone()


def averages(engine: Any) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's shares of the moving average and of the master weights, live, in the same order."""
    adam, held = _held(engine)
    return [adam.state[p][AVERAGE] for p in held], [p.detach() for p in held]


def _prepare_moments(engine: Any, steps: int | None) -> None:
    """Make the moments, which AdamW makes only in its first step, and set its count of ``steps`` if given."""
    adam, held = _held(engine)
    on_device = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    for p in held:
        state = adam.state[p]
        if not state:
            count = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
            state.update(step=count, **{name: torch.zeros_like(p.detach()) for name in MOMENTS})
        if steps is not None:
            state["step"].fill_(steps)


def _stretches(engine: Any, steps: int | None = None) -> list[Stretch]:
    """What this rank trains, in the order of the parameters; see :func:`_prepare_moments` for ``steps``."""
    _prepare_moments(engine, steps)
    stage, (adam, held) = engine.zero_optimization_stage(), _held(engine)
    found = []
    for name, p in _trained(engine):
        if stage == 0:
            flat, start, offset, length = p, 0, 0, p.numel()
        elif stage == 3:
            flat, start, offset, length = _place_in_zero3(engine.optimizer, held, p)
        elif p._hp_mapping is None:  # no part of it is in this rank's partition
            continue
        else:
            place = p._hp_mapping
            inner, outer = place.hp_fragment_address, place.lp_fragment_address
            flat, start, offset, length = held[place.param_group_index], outer.start, inner.start, inner.numel
        state = adam.state[flat]
        whole = {MASTER: flat, **{kind: state[kind] for kind in (*MOMENTS, AVERAGE) if kind in state}}
        values = {kind: value.detach().view(-1).narrow(0, offset, length) for kind, value in whole.items()}
        found.append(Stretch(name, start, values))
    return found


def _place_in_zero3(optimizer: Any, held: list[Tensor], p: Tensor) -> tuple[Tensor, int, int, int]:
    """The flat partition that holds this rank's part of ``p``; where in ``p`` it starts; its place there; its length.

    ZeRO-3 cuts each parameter into equal parts, one a rank; the last ones may be partly or all padding.
    """
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(p)]
    start = min(distributed.rank() * length, p.ds_numel)
    return held[group], start, offset, min(length, p.ds_numel - start)


def _check_same_parameters(engine: Any, saved: dict[str, int]) -> None:
    own = _sizes(engine)
    other = [name for name in {**own, **saved} if own.get(name) != saved.get(name)]
    if other:
        raise SharedError(
            f"it holds other parameters than this run trains ({len(other)}, such as {other[0]}: "
            f"{saved.get(other[0], 'none')} there, {own.get(other[0], 'none')} here); resume with the run's own config"
        )


def _pieces(opened: list[Any]) -> dict[tuple[str, str], list[tuple[int, Any]]]:
    """By kind and parameter: first element, and the part of a file that holds it; nothing is read yet."""
    pieces = defaultdict(list)
    for file in opened:
        for key in file.keys():  # noqa: SIM118
            place, name = key.split("/", 1)
            kind, start = place.split("@")
            pieces[kind, name].append((int(start), file.get_slice(key)))
    return pieces


def _fill(value: Tensor, stretch: Stretch, kind: str, pieces: list[tuple[int, Any]]) -> None:
    """Copy the elements of ``stretch`` from the pieces that hold some of them."""
    begin, end = stretch.start, stretch.start + len(value)
    filled = 0
    for start, piece in pieces:
        first, last = max(begin, start), min(end, start + piece.get_shape()[0])
        if first < last:
            value[first - begin : last - begin].copy_(piece[first - start : last - start])
            filled += last - first
    if filled != len(value):
        raise InputError(f"its files lack {len(value) - filled} elements of {kind} of {stretch.name}")


def _refresh_model(engine: Any) -> None:
    """Bring the weights that the model computes with up to the master weights."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            if flat.numel():
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
    elif stage:
        optimizer.update_lp_params()
