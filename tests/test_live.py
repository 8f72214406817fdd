"""What a training shows of itself while it goes on: the loader's headroom, and the use of the machine's peak."""

import math
import time
from dataclasses import replace

import pytest
import torch
from test_engine import SmallEngine, SmallLoader
from training import metrics

from fastsskd import config, flops, peak, progress
from fastsskd.engine import Log, StagePlan, train_stage
from fastsskd.loader import Loader

PLAN = StagePlan("iter1-ssl", 4, 4, 0, 1e-3, "constant", 1, 0, log_every=4)


class Busy(SmallLoader):
    """One whose two workers are busy for a quarter of the time."""

    workers = 2

    @property
    def busy(self) -> float:
        return 0.25 * 2 * time.perf_counter()


def log_of(loader, plan=PLAN) -> Log:
    logs = []
    train_stage(SmallEngine(), loader, plan, on_log=logs.append)
    return logs[0]


def test_headroom_is_what_the_workers_were_idle():
    assert log_of(Busy([[0], [1]])).headroom == pytest.approx(3.0, rel=0.05)


def test_a_loader_that_does_not_tell():
    log = log_of(SmallLoader([[0], [1]]))
    assert math.isnan(log.headroom) and math.isnan(log.mfu)
    assert progress.live(log) == ""


def test_mfu_by_hand():
    log = log_of(Busy([[0, 1, 2]]), replace(PLAN, clip_flops=1e9, peak_flops=1e12))
    assert log.clips == 12
    assert log.mfu == pytest.approx(12 * 1e9 / log.seconds / 1e12)
    assert "spare 300 %" in progress.live(replace(log, headroom=3.0)) and "mfu" in progress.live(log)
    assert "spare 999 %" in progress.live(replace(log, headroom=1e6))


def test_a_loader_counts_its_workers_time(tones):
    loader = Loader(tones, batch_size=8, seconds=0.96, train=True, workers=2, prefetch=2)
    begin = time.perf_counter()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    first = loader.busy
    assert 0 < first < 2 * (time.perf_counter() - begin)
    loader.close()
    closed = loader.busy
    assert closed >= first
    next(iter(loader))
    assert loader.busy > closed  # of the new workers too
    loader.close()


def test_a_peak_is_what_a_large_product_reaches():
    found = peak.peak_flops(torch.device("cpu"), "fp32")
    assert 1e8 < found < 1e15 and found == peak.peak_flops(torch.device("cpu"), "fp32")  # measured once


def test_a_peak_is_the_best_of_many_products_without_the_first(monkeypatch):
    """A slow first product, and others that a busy machine holds up, do not make the peak a low one."""
    took, now = iter([9.0] + 5 * [2.0] + [0.5] + 9 * [2.0]), [0.0]

    def product(self, other):
        now[0] += next(took)
        return self

    monkeypatch.setattr(peak.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert peak.peak_flops.__wrapped__(torch.device("cpu"), "fp32") == 2.0 * 1024**3 / 0.5


def test_measuring_the_peak_draws_no_numbers():
    before = torch.get_rng_state()
    peak.peak_flops.__wrapped__(torch.device("cpu"), "bf16")
    assert torch.equal(torch.get_rng_state(), before)


def test_operations_of_a_clip():
    base = config.Config()
    assert peak.clip_flops(base, "ssl", 10) == flops.pretrain_step("base").total
    assert peak.clip_flops(base, "distill", 10) == flops.distill_step("base", 10).total
    taught = peak.clip_flops(base, "distill", 10, teacher=lambda waveform: None)
    assert taught == flops.distill_step("base", 10, teacher="base").total


def test_a_run_writes_both(training, tones, tmp_path):
    lines, _, printed = training.run(tmp_path / "run", tones, distill__epochs=1)
    assert lines == metrics(tmp_path / "run")
    assert all(line["headroom"] >= 0 and line["mfu"] > 0 for line in lines)
    assert "spare" in printed and "mfu" in printed
