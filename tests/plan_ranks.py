"""What a DeepSpeed engine really sends and keeps, for test_plan.py: run on each of some ranks."""

import gc
import json
import os
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

MICRO, ACCUMULATION = 2, 2
KINDS = {  # stage, precision
    "0 fp32": {},
    "1 fp32": {"zero_optimization": {"stage": 1}},
    "1 bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "2 bf16": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 300_000}, "bf16": {"enabled": True}},
    "3 bf16": {
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 300_000,
        },
        "bf16": {"enabled": True},
    },
}
#: Bytes that a ring sends from each rank, for each byte of the whole tensor and (ranks - 1) / ranks.
RING = {"all_reduce": 2.0, "all_gather_into_tensor": 1.0, "reduce_scatter_tensor": 1.0}
OTHERS = ("all_gather", "reduce_scatter", "reduce", "broadcast", "all_to_all_single")


class Collectives:
    """Counts the bytes of torch's collectives; must be there before the process group is."""

    def __init__(self):
        self.counting, self.sent, self.others = False, 0.0, Counter()
        for name in (*RING, *OTHERS):
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name, function):
        def wrapped(*args, **kwargs):
            if self.counting:
                tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
                whole = max((t.numel() * t.element_size() for t in tensors), default=0)
                ranks = dist.get_world_size()
                self.sent += RING.get(name, 0.0) * whole * (ranks - 1) / ranks
                self.others[name] += name in OTHERS
            return function(*args, **kwargs)

        return wrapped


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(400, 300), nn.GELU(), nn.Linear(300, 500))


def observe(folder: str) -> None:
    """Writes, for each kind, the bytes sent in a step and the bytes of all tensors between two steps."""
    collectives = Collectives()
    import deepspeed

    from fastsskd import distributed

    torch.set_num_threads(1)
    distributed.start("cpu", 60)
    found = {}
    for kind, extra in KINDS.items():
        before = _alive()
        sizes = {"train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": ACCUMULATION}
        config = {**sizes, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9, **extra}
        module = net()
        optimizer = torch.optim.AdamW(module.parameters())
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        del optimizer
        for counted in (False, True):  # the first step allocates, and records what is used when
            collectives.sent, collectives.counting = 0.0, counted
            for _ in range(ACCUMULATION):
                loss = engine(torch.randn(MICRO, 400).to(next(module.parameters()).dtype))
                engine.backward(loss.float().square().mean())
                engine.step()
        collectives.counting = False
        del loss
        engine.optimizer.zero_grad()
        held = sum(storage.nbytes() for address, storage in _alive().items() if address not in before)
        found[kind] = {"sent": collectives.sent, "held": held}
        engine.destroy()
        del engine, module
        gc.collect()
    assert not collectives.others.total(), collectives.others
    if os.environ["RANK"] == "0":
        Path(folder, f"observed by {distributed.world_size()}.json").write_text(json.dumps(found))


def _alive() -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors there are, by its address; who holds the answer keeps it from being used anew."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor) and value.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}


def save_plan(file: str, *arguments: str) -> None:
    """What the command prints, in a file."""
    import contextlib

    from fastsskd import cli
    from fastsskd.plan import measure as plan_measure

    plan_measure.SECONDS = 0.2
    with open(file, "w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        assert cli.main(list(arguments)) == 0
