"""The training loop over a small engine of our own: exact weights, skips, resume, stop."""

import copy
import dataclasses
import math
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastsskd import distributed, engine
from fastsskd.bad_steps import GradientWatch, SkippingAdamW
from fastsskd.engine import Log, StagePlan, StopFlag, Stopped, train_stage
from fastsskd.errors import InputError
from fastsskd.schedule import learning_rate


class Clips:
    """A batch: inputs and targets of some clips."""

    def __init__(self, numbers):
        numbers = np.array(numbers, np.int64)
        self.numbers, self.key = numbers, [f"clip{number}" for number in numbers]
        self.x = torch.from_numpy(np.stack([np.sin(numbers), np.cos(2.0 * numbers)], axis=1).astype(np.float32))
        self.y = torch.from_numpy(np.sin(0.7 * numbers).astype(np.float32))

    def __len__(self):
        return len(self.numbers)


class Line(torch.nn.Module):
    """Mean squared error of a squashed line; ``noisy`` draws from torch's global generator, as dropout does."""

    def __init__(self, noisy=False):
        super().__init__()
        self.weight, self.noisy = torch.nn.Parameter(torch.tensor([0.3, -0.2])), noisy

    def forward(self, batch):
        assert len(batch), "an empty batch has no mean"
        x = batch.x * torch.rand(batch.x.shape) if self.noisy else batch.x
        loss = ((x @ self.weight).tanh() - batch.y).square().mean()
        return loss, {"double": 2 * loss.detach()}


class SmallEngine:
    """What the loop uses of a DeepSpeed engine: gradients are averaged over ranks and divided by the accumulation."""

    def __init__(self, accumulation=1, noisy=False, average=lambda gradient: gradient):
        self.module, self.accumulation, self.average = Line(noisy), accumulation, average
        groups = [{"params": [self.module.weight], "lr_scale": 0.5}]
        self.optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        self.boundary = accumulation == 1
        self.seen, self.gradients, self.rates = [], [], []

    def train(self):
        self.module.train()

    def set_gradient_accumulation_boundary(self, boundary):
        self.boundary = boundary

    def __call__(self, batch):
        self.seen.append(len(batch))
        return self.module(batch)

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def step(self):
        if self.boundary:
            self.module.weight.grad = self.average(self.module.weight.grad)
            self.gradients.append(self.module.weight.grad.clone())
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            self.optimizer.zero_grad()


class SmallLoader:
    """Batches of an epoch, again and again, from a place that can be set."""

    def __init__(self, batches, position=0):
        self.batches, self.position = [Clips(numbers) for numbers in batches], position

    def __iter__(self):
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0


def plan(total_steps, *, accumulation=1, log_every=1, warmup_steps=0, peak_lr=0.2, schedule="constant") -> StagePlan:
    return StagePlan("iter1-ssl", total_steps, 4, warmup_steps, peak_lr, schedule, accumulation, 5, log_every)


def train(own_engine, batches, stage: StagePlan, position=0, **options) -> list[Log]:
    logs = []
    train_stage(own_engine, SmallLoader(batches, position), stage, on_log=logs.append, **options)
    return logs


def whole_gradient(numbers, weight=(0.3, -0.2)) -> tuple[torch.Tensor, float]:
    """Gradient and loss of all clips as one batch."""
    line = Line()
    line.weight.data = torch.tensor(weight)
    loss, _ = line(Clips(numbers))
    loss.backward()
    return line.weight.grad, loss.item()


# ------------------------------------------------------------------------------------------------------------ weights


def test_uneven_micro_batches_weigh_as_one_batch():
    own = SmallEngine(accumulation=3)
    logs = train(own, [[0, 1, 2, 3], [4, 5], [6]], plan(1, accumulation=3))
    gradient, loss = whole_gradient(range(7))
    torch.testing.assert_close(own.gradients, [gradient])
    assert own.seen == [4, 2, 1]
    assert logs[0].metrics == pytest.approx({"loss": loss, "double": 2 * loss})
    assert logs[0].clips == 7


def test_a_step_is_prepared_as_a_whole():
    own, seen = SmallEngine(accumulation=2), []

    def prepare(batches):
        seen.append([len(batch) for batch in batches])
        return batches[::-1]

    train(own, [[0, 1, 2], [3], [4], [5, 6]], plan(2, accumulation=2), prepare=prepare)
    assert seen == [[3, 1], [1, 2]] and own.seen == [1, 3, 2, 1]


def test_empty_micro_batches_are_skipped_and_the_rest_still_weighs_as_one():
    own = SmallEngine(accumulation=3)
    logs = train(own, [[0, 1, 2], [], [3]], plan(1, accumulation=3))
    gradient, loss = whole_gradient(range(4))
    torch.testing.assert_close(own.gradients, [gradient])
    assert own.seen == [3, 1] and logs[0].metrics["loss"] == pytest.approx(loss)


def test_an_empty_last_micro_batch_does_not_swallow_the_step():
    own = SmallEngine(accumulation=2)
    train(own, [[0, 1], []], plan(1, accumulation=2))
    torch.testing.assert_close(own.gradients, [whole_gradient(range(2))[0]])


def test_a_step_without_any_clip_leaves_the_weights_and_goes_on():
    own, steps = SmallEngine(), []
    logs = train(own, [[], [0, 1]], plan(2), on_step=lambda step, stopping: steps.append((step, stopping)))
    assert steps == [(1, False), (2, False)]
    assert own.seen == [2] and len(own.gradients) == 1
    assert [log.clips for log in logs] == [0, 2] and "loss" not in logs[0].metrics


class TwoRanks:
    """Two threads that agree as ranks do."""

    def __init__(self, monkeypatch):
        self.barrier, self.place, self.slots = threading.Barrier(2), threading.local(), [None, None]
        monkeypatch.setattr(distributed, "rank", lambda: self.place.rank)
        monkeypatch.setattr(distributed, "gather_numbers", self.gather)
        monkeypatch.setattr(distributed, "gather_objects", self.gather)

    def gather(self, value):
        self.slots[self.place.rank] = value
        self.barrier.wait(30)
        gathered = list(self.slots)
        self.barrier.wait(30)
        return gathered

    def average(self, gradient):
        return sum(self.gather(gradient.clone())) / 2

    def run(self, work):
        """``work(rank)`` on both ranks; returns what each one returned or raised."""
        results = [None, None]

        def target(rank):
            self.place.rank = rank
            try:
                results[rank] = work(rank)
            except Stopped as stopped:
                results[rank] = stopped
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()  # the other one would wait for this one

        threads = [threading.Thread(target=target, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def two_ranks(monkeypatch):
    return TwoRanks(monkeypatch)


def test_uneven_ranks_weigh_as_one_batch(two_ranks):
    """Rank 1 has lost clips; a micro-batch of which it has none left is skipped by both."""
    batches = ([[0, 1, 2], [3, 4], [5, 6]], [[7], [], [8, 9]])
    engines = [SmallEngine(accumulation=3, average=two_ranks.average) for _ in range(2)]
    results = two_ranks.run(lambda rank: train(engines[rank], batches[rank], plan(1, accumulation=3)))
    gradient, loss = whole_gradient([0, 1, 2, 7, 5, 6, 8, 9])
    for rank, logs in enumerate(results):
        torch.testing.assert_close(engines[rank].gradients, [gradient])
        assert logs[0].metrics["loss"] == pytest.approx(loss)  # over both ranks, on both ranks
        assert logs[0].clips == 8
    assert engines[0].seen == [3, 2] and engines[1].seen == [1, 2]


def test_ranks_stop_at_the_same_step_whoever_was_asked(two_ranks):
    class Asked:
        set = False

    flags, steps = [Asked(), Asked()], [[], []]

    def work(rank):
        def on_step(step, stopping):
            steps[rank].append((step, stopping))
            flags[rank].set = rank == 1 and step >= 3

        train(SmallEngine(average=two_ranks.average), [[rank]], plan(9), stop=flags[rank], on_step=on_step)

    results = two_ranks.run(work)
    assert all(isinstance(result, Stopped) for result in results)
    assert steps[0] == steps[1] == [(1, False), (2, False), (3, False), (4, True)]


# -------------------------------------------------------------------------------------------------------- the schedule


def test_each_step_has_its_learning_rate_times_the_group_s_scale():
    own = SmallEngine()
    logs = train(own, [[0], [1]], plan(6, warmup_steps=2, schedule="cosine"))
    expected = [learning_rate(step, 6, 2, 0.2, "cosine") for step in range(6)]
    assert own.rates == pytest.approx([0.5 * rate for rate in expected])
    assert [log.lr for log in logs] == pytest.approx(expected)


def test_epochs_follow_each_other():
    own = SmallEngine()
    train(own, [[0], [1, 2], [3, 4, 5]], plan(7))
    assert own.seen == [1, 2, 3, 1, 2, 3, 1]


# ------------------------------------------------------------------------------------------------------------- resume

BATCHES = [[0, 1, 2], [3], [4, 5], [6, 7], [8]]


class StopAfter:
    """Raised by hand instead of a signal."""

    def __init__(self):
        self.set = False


@pytest.mark.parametrize("stop_at", [1, 4, 9])
def test_a_resumed_run_s_losses_are_the_uninterrupted_one_s(stop_at):
    """Bit for bit, though the model draws random numbers and the process drew others in between."""
    stage = plan(10, warmup_steps=3, schedule="cosine")
    whole = SmallEngine(noisy=True)
    expected = train(whole, BATCHES, stage)

    first, flag, kept = SmallEngine(noisy=True), StopAfter(), {}

    def on_step(step, stopping):
        flag.set = step >= stop_at - 1
        if stopping:
            kept.update(copy.deepcopy({"model": first.module.state_dict(), "optimizer": first.optimizer.state_dict()}))

    flag.set = stop_at == 1
    logs = []
    with pytest.raises(Stopped, match=f"iter1-ssl: stopped after step {stop_at}"):
        train_stage(first, SmallLoader(BATCHES), stage, stop=flag, on_log=logs.append, on_step=on_step)
    torch.rand(1000)
    second = SmallEngine(noisy=True)
    second.module.load_state_dict(kept["model"])
    second.optimizer.load_state_dict(kept["optimizer"])
    logs += train(second, BATCHES, stage, position=stop_at % len(BATCHES), start_step=stop_at)
    assert [log.step for log in logs] == list(range(1, 11))
    assert [log.metrics for log in logs] == [log.metrics for log in expected]
    assert torch.equal(second.module.weight, whole.module.weight)


def test_the_model_s_draws_differ_between_steps_ranks_and_stages(monkeypatch):
    def draw(seed, step, rank):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        drawn = []
        stage = StagePlan("x", 9, 9, 0, 0.0, "constant", 1, seed, 1)
        train_stage(
            SmallEngine(),
            SmallLoader([[0]]),
            stage,
            start_step=step,
            on_step=lambda *_: drawn.append(torch.rand(1).item()),
        )
        return drawn[0]

    assert len({draw(5, 0, 0), draw(5, 1, 0), draw(5, 0, 1), draw(6, 0, 0)}) == 4
    assert draw(5, 3, 0) == draw(5, 3, 0)


# --------------------------------------------------------------------------------------------------------------- stop


@pytest.fixture
def handlers():
    """Puts the process's signal handlers back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_in_hand(handlers, number):
    flag, steps, logs = StopFlag(), [], []

    def on_step(step, stopping):
        steps.append((step, stopping))
        if step == 2:
            os.kill(os.getpid(), number)

    assert not flag.set
    with pytest.raises(Stopped):
        train_stage(
            SmallEngine(), SmallLoader([[0]]), plan(9, log_every=100), stop=flag, on_step=on_step, on_log=logs.append
        )
    assert steps == [(1, False), (2, False), (3, True)]
    assert [log.step for log in logs] == [3]  # what was not logged yet is, before the checkpoint


def test_a_second_ctrl_c_kills_at_once(handlers):
    StopFlag()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# --------------------------------------------------------------------------------------------------------------- logs


def test_a_log_is_the_mean_over_the_clips_since_the_last_one():
    own = SmallEngine()
    own.optimizer.param_groups[0]["lr_scale"] = 0.0  # the weights stay, so that losses can be added up
    logs = train(own, [[0, 1, 2], [3], [4, 5], [6, 7], [8]], plan(5, log_every=2))
    assert [log.step for log in logs] == [2, 4, 5]
    assert [log.clips for log in logs] == [4, 4, 1]
    each = [whole_gradient(numbers)[1] for numbers in ([0, 1, 2], [3], [4, 5], [6, 7], [8])]
    assert logs[0].metrics["loss"] == pytest.approx((each[0] + each[1]) / 2)
    assert logs[1].metrics["loss"] == pytest.approx((each[2] + each[3]) / 2)
    assert logs[2].metrics["loss"] == pytest.approx(each[4])
    for log in logs:
        assert log.seconds > 0 and 0 <= log.wait <= 1 and math.isnan(log.grad_norm)


def test_the_gradient_norm_is_the_engine_s():
    own = SmallEngine()
    own.get_global_grad_norm = lambda: torch.tensor(3.5)
    assert train(own, [[0]], plan(1))[0].grad_norm == 3.5


def test_nothing_is_read_from_the_device_between_logs(no_waiting):
    own, stage = SmallEngine(), plan(7, log_every=100)
    before_last = []

    def stop_looking(step, stopping):
        before_last.append(step)
        if step == 6:
            mode.__exit__(None, None, None)

    mode = no_waiting()
    mode.__enter__()
    train_stage(own, SmallLoader([[0, 1]]), stage, on_step=stop_looking)
    assert before_last == [1, 2, 3, 4, 5, 6, 7]


def test_weights_sum_to_the_accumulation_times_the_ranks(monkeypatch):
    """DeepSpeed divides by both: equal micro-batches must each weigh exactly 1, or every step would be rounded."""
    monkeypatch.setattr(distributed, "gather_numbers", lambda own: [own, own, own])
    weights, clips, stopping = engine._agree([Clips([0, 1]), Clips([2, 3])], False)
    assert weights == [1.0, 1.0] and clips == 12 and stopping is False


# ----------------------------------------------------------------------------------------------------------- bad steps


class SkippingEngine(SmallEngine):
    """Skips as DeepSpeed does. ``bad`` names batches whose loss is a NaN, by their first clip."""

    def __init__(self, bad, value=float("nan"), **options):
        super().__init__(**options)
        self.bad, self.value = set(bad), value
        self.optimizer = SkippingAdamW([{"params": [self.module.weight], "lr_scale": 1.0}])

    def __call__(self, batch):
        loss, parts = super().__call__(batch)
        # Added, so that the gradients alone would not tell.
        return (loss + self.value if int(batch.numbers[0]) in self.bad else loss), parts


def state(own):
    moments = own.optimizer.state[own.module.weight]
    return [own.module.weight.detach().clone(), *(moments[key].clone() for key in sorted(moments))]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_skips_the_step_though_its_gradient_is_finite(value):
    own, states, bad = SkippingEngine([2], value), [], []
    logs = train(own, [[0], [1], [2], [3]], plan(4), on_step=lambda *_: states.append(state(own)), on_bad=bad.append)
    assert all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
    assert not torch.equal(states[2][0], states[3][0])
    (only,) = bad
    assert (only.step, only.in_a_row) == (3, 1)
    assert [(s["rank"], s["keys"]) for s in only.suspects] == [(0, ["clip2"])]
    assert "the loss of rank 0 is" in str(only) and "max_bad_steps = 5" in str(only)
    assert "loss" not in logs[2].metrics and all(math.isfinite(logs[i].metrics["loss"]) for i in (0, 1, 3))


def test_a_gradient_that_is_not_finite_makes_all_clips_suspect():
    own, bad = SkippingEngine([]), []
    own.module.weight.register_hook(lambda gradient: gradient * (float("inf") if len(own.seen) == 2 else 1.0))
    logs = train(own, [[0], [1, 2], [3]], plan(3), on_bad=bad.append)
    (only,) = bad
    assert only.step == 2 and only.suspects[0]["keys"] == ["clip1", "clip2"]
    assert "a gradient is not finite, though every rank's loss is" in str(only)
    assert math.isfinite(logs[1].metrics["loss"])


class Inner(torch.nn.Module):
    """A layer that a batch meets first, in two views, the second of which has no graph; what follows is squared."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(2, 3)

    def forward(self, x, exponent):
        with torch.no_grad():
            self.first(x)
        # The root of a zero has a finite value and an infinite slope.
        return (self.first(x).square().sum(dim=2) * 0).pow(exponent).sum() + self.first(x).sum()


def test_a_watch_tells_the_clips_whose_gradients_are_not_finite():
    inner = Inner()
    watch = GradientWatch(inner.first)
    exponent = torch.tensor([2.0, 0.5, 2.0, 0.5])[:, None]
    inner(torch.randn(4, 5, 2), exponent).backward()
    assert not inner.first.weight.grad.isfinite().any()
    sums = watch.take()
    assert [own.isfinite().tolist() for own in sums] == [[True] * 4, [True, False, True, False]]
    assert torch.equal(sums[0], torch.full((4,), 15.0))
    assert watch.take() == []


def test_a_gradient_that_is_not_finite_is_blamed_on_its_clips():
    own, bad = SkippingEngine([]), []
    own.module.weight.register_hook(lambda gradient: gradient * (float("inf") if len(own.seen) == 2 else 1.0))
    seen = SimpleNamespace(take=lambda: [torch.ones(own.seen[-1]), torch.tensor([1.0, float("nan")])[-own.seen[-1] :]])
    train(own, [[0], [1, 2], [3]], plan(3), on_bad=bad.append, watch=seen)
    (only,) = bad
    assert only.step == 2 and [suspect["keys"] for suspect in only.suspects] == [["clip2"]]
    assert str(only).startswith("the gradient of 1 clip(s) of rank 0 is not finite, though every rank's loss is")


def test_only_bad_steps_in_a_row_end_the_run():
    stage = dataclasses.replace(plan(9), max_bad_steps=3)
    bad = []
    train(SkippingEngine([1, 2, 4, 5]), [[i] for i in range(9)], stage, on_bad=bad.append)
    assert [step.in_a_row for step in bad] == [1, 2, 1, 2]
    bad.clear()
    with pytest.raises(InputError) as caught:
        train(SkippingEngine([2, 3, 4]), [[i] for i in range(9)], stage, on_bad=bad.append)
    text = str(caught.value)
    assert "gave up at step 5: the loss of rank 0 is nan (in a row: 3" in text and "\n" not in text
    assert [step.step for step in bad] == [3, 4, 5]


def test_the_good_micro_batches_of_a_bad_step_still_count_in_the_log():
    own, bad = SkippingEngine([2], accumulation=2), []
    logs = train(own, [[0, 1], [2, 3]], plan(1, accumulation=2), on_bad=bad.append)
    assert [suspect["keys"] for suspect in bad[0].suspects] == [["clip2", "clip3"]]
    assert logs[0].metrics["loss"] == pytest.approx(whole_gradient([0, 1])[1])


def test_an_empty_step_after_a_bad_one_is_not_bad():
    bad = []
    train(SkippingEngine([1]), [[0], [1], [], [3]], plan(4), on_bad=bad.append)
    assert [step.step for step in bad] == [2]


def test_every_rank_hears_of_the_one_with_the_nan(two_ranks):
    engines = [SkippingEngine([], average=two_ranks.average), SkippingEngine([11], average=two_ranks.average)]
    heard = [[], []]
    batches = ([[0], [1], [2]], [[10], [11], [12]])
    two_ranks.run(lambda rank: train(engines[rank], batches[rank], plan(3), on_bad=heard[rank].append))
    for bad in heard:
        assert [(step.step, step.suspects[0]["rank"], step.suspects[0]["keys"]) for step in bad] == [(2, 1, ["clip11"])]
    assert torch.equal(engines[0].module.weight, engines[1].module.weight)


def test_fp16_in_search_of_its_loss_scale_is_not_bad():
    own, bad = SkippingEngine([]), []
    own.optimizer.dynamic_loss_scale = True
    own.module.weight.register_hook(lambda gradient: gradient * float("inf"))
    logs = train(own, [[0]], plan(20), on_bad=bad.append)
    assert bad == [] and len(logs) == 20 and torch.equal(own.module.weight, torch.tensor([0.3, -0.2]))


def test_the_smallest_loss_scale_ends_the_run_in_one_line():
    own = SmallEngine()

    def step():
        raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")

    own.step = step
    with pytest.raises(InputError, match=r"the smallest loss scale \(fp16.min_loss_scale\)") as caught:
        train(own, [[0]], plan(1))
    assert "\n" not in str(caught.value)
