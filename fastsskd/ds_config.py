"""The DeepSpeed JSON: what it owns, what it must not say, and what this version gets wrong.

It owns batch sizes, precision, ZeRO, gradient clipping and the logging back-ends. Optimizer and schedule belong to the
TOML; having them here too would give one quantity two owners, so they are refused.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsskd.errors import InputError, UsageError

#: Top-level keys we pass on to DeepSpeed, which by itself would ignore a misspelt one.
KNOWN_KEYS = frozenset(
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "fp16",
        "bf16",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "prescale_gradients",
        "gradient_predivide_factor",
        "communication_data_type",
        "data_types",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "flops_profiler",
        "comms_logger",
        "activation_checkpointing",
        "checkpoint",
        "aio",
        "disable_allgather",
    ]
)
#: Keys whose value is an object of settings.
OBJECTS = (
    *("fp16", "bf16", "zero_optimization", "data_types", "activation_checkpointing", "checkpoint", "aio"),
    *("tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler", "comms_logger"),
)
#: Keys with another owner: where the same thing is set instead.
OWNED_BY_TOML = {
    "optimizer": "[optim], ssl.lr and distill.lr",
    "scheduler": "optim.schedule and warmup_epochs",
    "seed": "run.seed",
    "data_efficiency": "[data] and run.seed",
    "curriculum_learning": "[data]",
    "dataloader_drop_last": "the loader, which drops the tail of an epoch to whole global batches",
}
#: Settings that would break a promise: section, key, the value refused, why.
REFUSED = (
    ("bf16", "check_grad_overflow", False, "one NaN would spoil the weights of every rank; remove it"),
    ("zero_optimization", "compute_grad_norm", False, "one NaN would spoil the weights of every rank; remove it"),
    ("zero_optimization", "round_robin_gradients", True, "DeepSpeed 0.19 then mixes up the float32 weights; remove it"),
    ("bf16", "bf16_master_weights_and_grads", True, "checkpoints hold float32 master weights; remove it"),
    ("fp16", "fp16_master_weights_and_grads", True, "checkpoints hold float32 master weights; remove it"),
)


@dataclass(frozen=True)
class BatchSizes:
    """Clips per optimizer step (``total``), per rank and forward pass (``micro``), and forward passes per step."""

    total: int
    micro: int
    accumulation: int


def load(path: str | Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON.

    Raises:
        InputError: absent. UsageError: not JSON, unknown key, a key the TOML owns, or a combination that is wrong.
    """
    path = Path(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"ds_config {path}: {error.strerror}; examples are launch/ds_config*.json") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"ds_config {path}: not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"ds_config {path}: expected an object of settings")
    for key in tree:
        if key in OWNED_BY_TOML:
            raise UsageError(f"ds_config {path}: '{key}' belongs to the TOML ({OWNED_BY_TOML[key]}); remove it here")
        if key not in KNOWN_KEYS:
            raise UsageError(f"ds_config {path}: unknown key '{key}'")
    for key in OBJECTS:
        if not isinstance(tree.get(key, {}), dict):
            raise UsageError(f"ds_config {path}: '{key}' must be an object, such as {{\"enabled\": true}}")
    for key in ("fp16", "bf16"):
        if type(tree.get(key, {}).get("enabled", False)) is not bool:
            raise UsageError(f"ds_config {path}: {key}.enabled must be true or false, got {tree[key]['enabled']!r}")
    clipping = tree.get("gradient_clipping", 0.0)
    if type(clipping) not in (int, float) or not clipping >= 0.0:
        raise UsageError(f"ds_config {path}: gradient_clipping must be a number from 0 on, got {clipping!r}")
    _check_precision(tree, path)
    _check_refused(tree, path)
    return tree


def zero_stage(tree: dict[str, Any]) -> int:
    """The ZeRO stage, 0 when none is named."""
    return tree.get("zero_optimization", {}).get("stage", 0)


def precision(tree: dict[str, Any]) -> str:
    """``"fp32"``, ``"fp16"`` or ``"bf16"``."""
    for name in ("fp16", "bf16"):
        if tree.get(name, {}).get("enabled", False):
            return name
    return "fp32"


def _check_refused(tree: dict[str, Any], path: Path) -> None:
    for section, key, value, why in REFUSED:
        if tree.get(section, {}).get(key) is value:
            raise UsageError(f"ds_config {path}: {section}.{key} = {json.dumps(value)}: {why}")
    for key in ("offload_optimizer", "offload_param"):
        where = tree.get("zero_optimization", {}).get(key)
        if isinstance(where, dict) and where.get("device", "none") != "none":
            raise UsageError(f"ds_config {path}: zero_optimization.{key} is not supported; use more ranks or ZeRO-3")


def _check_precision(tree: dict[str, Any], path: Path) -> None:
    stage = zero_stage(tree)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UsageError(f"ds_config {path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    enabled = [name for name in ("fp16", "bf16") if tree.get(name, {}).get("enabled", False)]
    if len(enabled) == 2:
        raise UsageError(f"ds_config {path}: fp16 and bf16 are both enabled; choose one")
    if enabled and stage == 0:
        raise UsageError(
            f"ds_config {path}: {enabled[0]} with ZeRO stage 0 trains silently wrong in DeepSpeed 0.19; "
            'use "zero_optimization": {"stage": 1}'
        )


def check_device(tree: dict[str, Any], device: str) -> None:
    """Refuse a precision the device does not have; ``device`` is ``"cpu"`` or ``"cuda"``."""
    import torch

    name = precision(tree)
    if device == "cpu" and name == "fp16":
        raise UsageError('ds_config: fp16 needs a GPU; on a CPU use "bf16": {"enabled": true} or neither')
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        card = f"{torch.cuda.get_device_name()} (sm_{capability[0]}{capability[1]})"
        if not _has_code_for(capability, torch.cuda.get_arch_list()):
            build = "cu126 build of torch 2.11 and fastsskd[cuda12]: see 'V100' in docs/cluster.md"
            if capability >= (7, 5):
                build = "newest build of torch 2.11 (cu130) and fastsskd[cuda13]"
            raise UsageError(f"this torch build has no code for {card}; install the {build}")
        if name == "bf16" and capability < (8, 0):
            raise UsageError(f"ds_config: {card} has no bf16; use launch/ds_config_v100.json (fp16)")


def _has_code_for(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a torch build runs on a card: ``sm_`` code on the same major version, ``compute_`` code on any later."""
    for name in built_for:
        kind, _, digits = name.partition("_")
        if not digits.isdigit():  # "sm_90a": some kernels more, not all
            continue
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def batch_sizes(tree: dict[str, Any], world_size: int) -> BatchSizes:
    """Resolve the three batch sizes the way DeepSpeed does, but refuse contradictions in one line.

    Any two of them, ``train_batch_size`` alone, or ``train_micro_batch_size_per_gpu`` alone are enough.
    """
    total = _positive(tree, "train_batch_size")
    micro = _positive(tree, "train_micro_batch_size_per_gpu")
    accumulation = _positive(tree, "gradient_accumulation_steps")
    if total is None and micro is None:
        raise UsageError("ds_config: set train_batch_size or train_micro_batch_size_per_gpu")
    if total is None:
        accumulation = accumulation or 1
        total = micro * accumulation * world_size
    if micro is None:
        accumulation = accumulation or 1
        micro = total // (accumulation * world_size)
    if accumulation is None:
        accumulation = total // (micro * world_size)
    if micro * accumulation * world_size != total:
        raise UsageError(
            f"ds_config: train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {accumulation} x {world_size} rank(s); change one of them"
        )
    return BatchSizes(total, micro, accumulation)


def _positive(tree: dict[str, Any], key: str) -> int | None:
    value = tree.get(key)
    if value is None or value == "auto":
        return None
    if type(value) is not int or value < 1:
        raise UsageError(f"ds_config: {key} must be a positive integer, got {value!r}")
    return value


def resolve(tree: dict[str, Any], world_size: int, tensorboard_dir: Path) -> dict[str, Any]:
    """The dictionary handed to DeepSpeed: batch sizes filled in, logs pointed at the run's folder."""
    sizes = batch_sizes(tree, world_size)
    resolved = dict(tree)
    resolved["train_batch_size"] = sizes.total
    resolved["train_micro_batch_size_per_gpu"] = sizes.micro
    resolved["gradient_accumulation_steps"] = sizes.accumulation
    resolved.setdefault("steps_per_print", 2**31)  # we print our own progress
    if zero_stage(tree) == 3:
        # Otherwise ZeRO-3 patches F.linear for the whole process and a teacher changes the student's numbers.
        resolved["zero_optimization"] = {"memory_efficient_linear": False, **tree["zero_optimization"]}
    if tree.get("tensorboard", {}).get("enabled", False):
        resolved["tensorboard"] = {"output_path": str(tensorboard_dir), "job_name": "", **tree["tensorboard"]}
    _check_deeply(resolved)
    return resolved


def _check_deeply(resolved: dict[str, Any]) -> None:
    """Let DeepSpeed read its sections now: it knows their keys, and refuses them one line too late and too long."""
    import deepspeed
    from pydantic import ValidationError

    try:
        # A copy: DeepSpeed moves settings about while it reads them. The batch sizes were resolved for all ranks.
        sections = {
            key: value for key, value in resolved.items() if not key.endswith(("batch_size", "per_gpu", "steps"))
        }
        deepspeed.DeepSpeedConfig(copy.deepcopy({**sections, "train_micro_batch_size_per_gpu": 1}))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UsageError(f"ds_config: {error.title}: '{where}': {problem['msg']}; correct or remove it") from None
    except (AssertionError, ValueError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
        raise UsageError(f"ds_config: {str(error).strip().splitlines()[0]}") from None
