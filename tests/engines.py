"""Small engines: of every kind that a ds_config may ask for, as programs of one or two ranks; and a plain one."""

import json
import os
from pathlib import Path

import torch
from torch import nn

STAGE3 = {"stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 20}
HALF = {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 2, "hysteresis": 1}
BF16 = {"bf16": {"enabled": True}}
KINDS = {
    "0 fp32": {"zero_optimization": {"stage": 0}},
    "1 fp32": {"zero_optimization": {"stage": 1}},
    "2 fp32": {"zero_optimization": {"stage": 2}},
    "3 fp32": {"zero_optimization": STAGE3},
    "1 bf16": {"zero_optimization": {"stage": 1}, **BF16},
    "1 bf16, sums in fp32": {
        "zero_optimization": {"stage": 1},
        **BF16,
        "data_types": {"grad_accum_dtype": "fp32"},  # another optimizer of DeepSpeed's
    },
    "2 bf16": {"zero_optimization": {"stage": 2}, **BF16},
    "2 bf16, aligned": {"zero_optimization": {"stage": 2, "parameter_alignment": True}, **BF16},
    "3 bf16": {"zero_optimization": STAGE3, **BF16},
    "3 bf16, small groups": {"zero_optimization": {**STAGE3, "sub_group_size": 12}, **BF16},
    "1 fp16": {"zero_optimization": {"stage": 1}, "fp16": HALF},
    "3 fp16": {"zero_optimization": STAGE3, "fp16": HALF},
}
STEPS = 4
"""Before the state is saved, and after it."""
OTHER_PRECISION = [
    ("2 bf16", "1 fp32"),
    ("3 bf16", "3 fp32"),
    ("1 fp32", "3 bf16"),
    ("1 fp16", "1 bf16"),
    ("2 fp32", "1 fp16"),
]


def pairs() -> list[tuple[str, str, bool]]:
    """Which kind resumes from which: saved kind, loading kind, whether with the same number of ranks."""
    same = [(kind, kind, True) for kind in KINDS]
    other_ranks = [(kind, kind, False) for kind in KINDS]
    other_stage = []
    for precision in ("fp32", "bf16", "fp16"):
        own = [kind for kind in KINDS if precision in kind.split(",")[0]]
        other_stage += [(a, b, False) for a, b in zip(own, own[1:] + own[:1], strict=True)]
    return same + other_ranks + other_stage + [(a, b, True) for a, b in OTHER_PRECISION]


class Net(nn.Module):
    """Parameters of odd sizes, some of one element; ``frozen`` is not trained. ``model`` is what gets exported."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3))
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x, y):
        return (self.model(x.to(self.scale.dtype)).float() * self.scale.float() - y).square().mean()


class Plain:
    """What a checkpoint uses of an engine at stage 0, without DeepSpeed."""

    def __init__(self, sizes=(6, 1), steps=2):
        self.module = nn.ParameterDict({f"p{i}": nn.Parameter(torch.randn(n)) for i, n in enumerate(sizes)})
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.global_steps = self.global_samples = self.skipped_steps = 0
        for _ in range(steps):
            sum(p.square().sum() for p in self.module.values()).backward()
            self.optimizer.step()
            self.global_steps += 1

    def zero_optimization_stage(self):
        return 0

    def gradient_accumulation_steps(self):
        return 3


def start() -> None:
    from deepspeed.accelerator import get_accelerator

    from fastsskd import distributed

    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but the same arithmetic
    distributed.start("cpu", 60)


def engine(kind: str):
    import deepspeed

    from fastsskd.bad_steps import SkippingAdamW

    torch.manual_seed(0)
    net = Net()
    weights = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in weights if (p.dim() > 1) is decays]} for decays in (True, False)]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0
    adam = SkippingAdamW if kind.startswith("0") else torch.optim.AdamW
    config = {"train_batch_size": 8, "gradient_clipping": 1.0, "steps_per_print": 10**9, **KINDS[kind]}
    return deepspeed.initialize(model=net, optimizer=adam(groups, lr=1e-2, betas=(0.9, 0.95)), config=config)[0]


def step(own, number: int, spoil=lambda loss: loss) -> float:
    """Train on the batch of this number; returns the loss over all ranks. ``spoil`` changes the last rank's."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(8, 7, generator=generator), torch.randn(8, 3, generator=generator)
    loss = own(x.chunk(ranks)[rank], y.chunk(ranks)[rank])
    own.backward(spoil(loss) if rank == ranks - 1 else loss)
    own.step()
    mean = loss.detach() / ranks
    torch.distributed.all_reduce(mean)
    return mean.item()


def train_and_save(folder: str) -> None:
    """Each kind: train, save, train on, and meet a NaN on one rank. Writes losses and what the NaN did."""
    from fastsskd import distributed, engine_state

    start()
    ranks, found = distributed.world_size(), {}
    for kind in KINDS:
        own = engine(kind)
        losses = [step(own, number) for number in range(STEPS)]
        target = Path(folder, f"{ranks} {kind}")
        target.mkdir(exist_ok=True)
        engine_state.save(own, target)
        (target / f"about{distributed.rank()}.json").write_text(json.dumps(engine_state.describe(own)))
        losses += [step(own, number) for number in range(STEPS, 2 * STEPS)]
        found[kind] = {"losses": losses, **_meet_nan(own)}
        own.destroy()
    _write(Path(folder, f"saved by {ranks}.json"), found)


def _meet_nan(own) -> dict:
    """A step with a NaN on one rank, and the losses after it with and without that step."""
    before = _everything(own)
    step(own, 100, spoil=lambda loss: loss * float("nan"))
    same = all(torch.equal(value, before[name]) for name, value in _everything(own).items())
    return {"skipped": bool(own.optimizer.overflow), "same": same, "after_nan": step(own, 2 * STEPS)}


def _everything(own) -> dict:
    from fastsskd import engine_state

    parts = {f"{s.name}@{s.start} {k}": v for s in engine_state._stretches(own) for k, v in s.values.items()}
    whole = engine_state.full_state(own, {})
    return {name: value.clone() for name, value in {**parts, **whole}.items()}


def load_and_train(folder: str) -> None:
    """Resume as :func:`pairs` says: the losses of the steps after it."""
    from fastsskd import distributed, engine_state

    start()
    ranks, found = distributed.world_size(), {}
    for saved_kind, kind, same_ranks in pairs():
        saved = Path(folder, f"{ranks if same_ranks else 3 - ranks} {saved_kind}")
        own = engine(kind)
        about = json.loads((saved / "about0.json").read_text())
        engine_state.load(own, sorted(saved.glob("*.safetensors")), about)
        found[f"{saved.name} -> {ranks} {kind}"] = {
            "again": engine_state.describe(own) == about,
            "losses": [step(own, number) for number in range(STEPS, 2 * STEPS)],
        }
        own.destroy()
    _write(Path(folder, f"loaded by {ranks}.json"), found)


def _write(path: Path, found: dict) -> None:
    if os.environ["RANK"] == "0":
        path.write_text(json.dumps(found))


def overflow_at_the_smallest_loss_scale() -> None:
    """The first step overflows at a loss scale that is the smallest already."""
    import pytest

    from fastsskd.engine import _optimize
    from fastsskd.errors import InputError

    start()
    KINDS["smallest"] = {"zero_optimization": {"stage": 1}, "fp16": {**HALF, "min_loss_scale": 2**18}}
    own = engine("smallest")
    own.backward(own(torch.randn(4, 7), torch.randn(4, 3)) * 1e3)
    with pytest.raises(InputError, match="the smallest loss scale"):
        _optimize(own)


DECAY = 0.7


def follow_and_save(folder: str) -> None:
    """Each kind: train with a moving average and meet a NaN, save, train on. Writes all weights and averages."""
    from fastsskd import distributed, engine_state
    from fastsskd.moving_average import MovingAverage

    start()
    ranks, found = distributed.world_size(), {}
    for kind in KINDS:
        own = engine(kind)
        engine_state.keep_average(own)
        average = MovingAverage(own, DECAY)
        seen = [_weights(own, average)]
        for number in range(2 * STEPS):
            if number == STEPS:
                target = Path(folder, f"{ranks} {kind}")
                target.mkdir(exist_ok=True)
                engine_state.save(own, target)
                (target / f"about{distributed.rank()}.json").write_text(json.dumps(engine_state.describe(own)))
            step(own, number, spoil=(lambda loss: loss * float("nan")) if number == 1 else lambda loss: loss)
            average.update()
            seen.append({"good": not getattr(own.optimizer, "overflow", False), **_weights(own, average)})
        found[kind] = seen
        own.destroy()
    _write(Path(folder, f"followed by {ranks}.json"), found)


def load_and_follow(folder: str) -> None:
    """Resume as :func:`pairs` says: the weights and averages after the steps that follow."""
    from fastsskd import distributed, engine_state
    from fastsskd.moving_average import MovingAverage

    start()
    ranks, found = distributed.world_size(), {}
    for saved_kind, kind, same_ranks in pairs():
        saved = Path(folder, f"{ranks if same_ranks else 3 - ranks} {saved_kind}")
        own = engine(kind)
        engine_state.keep_average(own)
        engine_state.load(own, sorted(saved.glob("*.safetensors")), json.loads((saved / "about0.json").read_text()))
        average = MovingAverage(own, DECAY)
        begin = _weights(own, average)
        for number in range(STEPS, 2 * STEPS):
            step(own, number)
            average.update()
        found[f"{saved.name} -> {ranks} {kind}"] = [begin, _weights(own, average)]
        own.destroy()
    _write(Path(folder, f"went on by {ranks}.json"), found)


def _weights(own, average) -> dict:
    """The exported weights and their average, each as one list; and that a look at the average leaves no trace."""
    from fastsskd import engine_state

    def flat() -> list[float]:
        return torch.cat([value.flatten() for value in engine_state.full_state(own, {}).values()]).tolist()

    weights = flat()
    with average.in_place():
        averaged = flat()
    assert flat() == weights
    return {"weights": weights, "average": averaged}
