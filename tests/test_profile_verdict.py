"""From numbers to verdict and advice: every answer, on numbers that were made up."""

from dataclasses import replace

import pytest

from fastsskd.profile import verdict as v
from fastsskd.profile.advice import Advice, advise, contention, predict
from fastsskd.profile.disk import Disk
from fastsskd.profile.stages import Pace, marginal
from fastsskd.profile.stats import Interval, Waits
from fastsskd.profile.verdict import Found, RankFound, StageCost, judge, verdict

CALM = Waits(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
LOADER_STAGES = {"read": 0.1e-3, "decode": 2e-3, "resample, crop": 1e-3, "fbank": 0.4e-3, "HOG": 0.1e-3}
STEP_PARTS = {"masks": 0.1e-3, "views": 0.1e-3, "forward": 1e-3, "backward": 2e-3, "optimizer": 0.1e-3}


def around(value: float, spread: float = 0.03) -> Interval:
    return Interval(value, value * (1 - spread), value * (1 + spread))


def make_rank(step=1000.0, loader=3000.0, end_to_end=None, alone=None, waits=CALM) -> RankFound:
    end_to_end = min(step, loader) if end_to_end is None else end_to_end
    rates = [around(rate) for rate in (step, step, loader, end_to_end)]
    return RankFound(*rates, waits, 0.5, 24 / step, None if alone is None else around(alone), 1e9, 0.0)


def make(ranks=None, loader=LOADER_STAGES, parts=STEP_PARTS, **changes) -> Found:
    ranks = ranks or (make_rank(),)
    stages = [StageCost(name, "loader", 1 / s, s, s) for name, s in loader.items()]
    stages += [StageCost(name, "step", 1 / s, s, s) for name, s in parts.items()]
    given = {
        "node_ranks": len(ranks),
        "cores": 4,
        "shares_cores": False,
        "workers": 4,
        "prefetch": 4,
        "source": "ogg",
        "clip_seconds": 10.0,
        "precision": "bf16",
        "stages": tuple(stages),
        "threads": {4: Pace(4, 1000.0, 1e-3)},
    }
    return Found(ranks=tuple(ranks), **{**given, **changes})


def advice_of(found: Found) -> list[Advice]:
    return advise(found, verdict(found).word)


def keys(found: Found) -> list[str]:
    return [one.key for one in advice_of(found)]


@pytest.mark.parametrize(
    ("loader", "spread", "communication", "word"),
    [
        (300.0, 0.03, 0.0, v.LOADER),
        (850.0, 0.03, 0.0, v.LOADER),  # clearly apart, though not by much
        (950.0, 0.03, 0.0, v.BALANCED),
        (1050.0, 0.03, 0.0, v.BALANCED),
        (1000.0, 0.4, 0.0, v.UNCLEAR),
        (1500.0, 0.4, 0.0, v.UNCLEAR),
        (700.0, 0.3, 0.0, v.UNCLEAR),
        (1500.0, 0.03, 0.0, v.COMPUTE),
        (3000.0, 0.4, 0.0, v.COMPUTE),  # wide, but apart
        (3000.0, 0.03, 0.4, v.COMPUTE),
        (3000.0, 0.03, 0.6, v.COMMUNICATION),
        (300.0, 0.03, 0.9, v.LOADER),  # what is slowest counts
    ],
)
def test_the_word(loader, spread, communication, word):
    assert judge(around(1000.0, spread), around(loader, spread), communication) == word


def test_the_line_says_rates_and_headroom():
    line = verdict(make([make_rank(1000.0, 1500.0)])).line
    assert line == "COMPUTE-BOUND: the step could take 1000 clips/s, the loader gives 1500 (headroom +50 %)"
    assert "headroom -70 %" in verdict(make([make_rank(1000.0, 300.0)])).line


def test_what_cannot_be_told_is_said_with_both_intervals():
    wide = [Interval(1000, 500, 2000), Interval(1000, 500, 2000), Interval(1300, 700, 2600), Interval(900, 400, 1500)]
    found = verdict(make([RankFound(*wide, CALM, 0.5, 0.024, None, 1e9, 0.0)]))
    assert found.word == v.UNCLEAR and "500" in found.line and "2600" in found.line and "--seconds" in found.line


def test_the_slowest_rank_counts_for_the_loader():
    found = make([make_rank(1000, 3000), make_rank(1000, 600), make_rank(1000, 3000)])
    assert found.loader.value == 1800 and found.step.value == 3000
    assert verdict(found).word == v.LOADER
    assert v.slow_rank(found) == (1, "its loader takes", pytest.approx(5.0))
    first = advice_of(found)[0]
    assert first.key == "slow rank" and first.gain == pytest.approx(3000 / 1800)  # then the step is the limit


def test_waiting_for_a_slow_rank_is_not_communication():
    ranks = [make_rank(100, 3000, alone=alone) for alone in (0.02, 0.24, 0.02)]
    found = make(ranks)
    assert found.communication == 0.0
    assert v.slow_rank(found) == (1, "its step takes", pytest.approx(12.0))
    assert verdict(found).word == v.COMPUTE and "rank 1 is slow" in verdict(found).line


def test_communication_is_what_goes_away_on_the_slowest_rank():
    ranks = [make_rank(100, 3000, alone=alone) for alone in (0.06, 0.05)]  # of 0.24 s
    found = make(ranks)
    assert found.communication == pytest.approx(0.75)
    assert verdict(found).word == v.COMMUNICATION and keys(found)[0] == "communication"
    assert v.slow_rank(found) is None


def test_contention_is_read_from_the_three_rates():
    assert contention(100.0, 100.0, 50.0) == pytest.approx(1.0)  # one after the other
    assert contention(100.0, 300.0, 100.0) == pytest.approx(0.0)  # side by side
    assert contention(100.0, 100.0, 200.0) == 0.0 and contention(100.0, 100.0, 1.0) == 1.0  # noise has limits


def test_a_prediction_by_hand():
    side_by_side = make([make_rank(1000, 400)])
    assert predict(side_by_side, loader=2.0) == pytest.approx(2.0)
    assert predict(side_by_side, loader=10.0) == pytest.approx(2.5)  # the step is the limit then
    assert predict(side_by_side, step=10.0) == pytest.approx(1.0)
    in_turn = make([make_rank(100, 100, end_to_end=50)], shares_cores=True)
    assert predict(in_turn, loader=2.0) == pytest.approx(20 / 15)
    assert predict(in_turn, step=2.0, loader=2.0) == pytest.approx(2.0)


def test_threads_are_advised_as_few_as_do():
    threads = {n: Pace(n, rate, 1e-3) for n, rate in {1: 100, 2: 200, 4: 390, 8: 400, 16: 380}.items()}
    slow = make([make_rank(1000, 100)], threads=threads, workers=1, source="pack")
    (first, *_) = advice_of(slow)
    assert first.key == "threads" and first.value == 4 and "data.workers=4" in first.how
    assert first.gain == pytest.approx(3.9)
    assert "threads" not in keys(replace(slow, workers=4))


@pytest.mark.parametrize(("heavy", "says"), [("decode", "decoding takes"), ("resample, crop", "resampling takes")])
def test_packing_is_advised_for_what_it_saves(heavy, says):
    found = make([make_rank(3000, 300)], loader={**LOADER_STAGES, heavy: 20e-3})
    first = advice_of(found)[0]
    assert first.key == "pack" and says in first.text
    left = 0.4e-3 + 0.1e-3 + 320000 / 2e9
    whole = sum({**LOADER_STAGES, heavy: 20e-3}.values())
    assert first.gain == pytest.approx(min(whole / left, 10.0))  # ten times, and the step is the limit


def test_packing_is_not_advised_for_what_is_packed():
    assert "pack" not in keys(make([make_rank(3000, 300)], source="pack"))
    assert "pack" not in keys(make([make_rank(1000, 9000)]))  # nothing to gain


def test_packing_does_not_help_a_slow_disk():
    """Packed clips are three times as many bytes as these."""
    slow = make(
        [make_rank(3000, 100)],
        loader={**LOADER_STAGES, "read": 40e-3, "decode": 0.5e-3},
        disk=Disk(5e6, 1e9, 50, 100, 100e3, 0.0),
    )
    assert keys(slow)[0] == "disk" and "pack" not in keys(slow)
    assert "reading takes" in advice_of(slow)[0].text


def test_a_disk_that_more_threads_hide():
    threads = {1: Pace(1, 100, 1e-3), 4: Pace(4, 390, 1e-3)}
    found = make([make_rank(3000, 100)], loader={**LOADER_STAGES, "read": 40e-3}, threads=threads, workers=1)
    first = advice_of(found)[0]
    assert first.key == "disk" and first.value == 4 and "data.workers=4" in first.how
    assert "threads" not in keys(found)


def test_a_cold_disk_is_told_if_it_was_really_cold():
    slow = Disk(disk=1e7, memory=1e9, cold=50, warm=900, bytes=100e3, still=0.0)
    assert "disk" in keys(make(disk=slow)) and "disk" not in keys(make(disk=replace(slow, still=1.0)))
    assert "disk" not in keys(make(disk=replace(slow, cold=890)))


def test_a_teacher_is_worth_storing():
    found = make(parts={**STEP_PARTS, "teacher": 30e-3})
    first = advice_of(found)[0]
    assert first.key == "teacher" and "fastsskd teach" in first.how
    assert first.gain == pytest.approx(3.0)  # then the loader is the limit
    fast = make([make_rank(1000, 90000)], parts={**STEP_PARTS, "teacher": 30e-3})
    assert advice_of(fast)[0].gain == pytest.approx((30 + 3.3) / 3.3)


def test_a_burst_wants_more_batches_ahead():
    bursts = Waits(0.0, 0.1, 0.2, 0.3, 0.7, 0.2)
    found = make([make_rank(1000, 3000, waits=bursts)])
    first = advice_of(found)[0]
    assert first.key == "prefetch" and first.value == 16 and first.gain == pytest.approx(1.25)
    assert "prefetch" not in keys(replace(found, shares_cores=True))  # there they wait for a core
    assert "prefetch" not in keys(make([make_rank(1000, 100, waits=bursts)]))  # the loader is too slow for any depth


def test_an_optimizer_that_costs_as_much_as_the_model():
    found = make([make_rank(1000, 90000)], parts={**STEP_PARTS, "optimizer": 3.2e-3})
    assert "optimizer" in keys(found) and advice_of(found)[0].gain == pytest.approx(6.4 / 4.8)


def test_a_large_model_is_the_answer_where_nothing_else_is():
    found = make([make_rank(100, 3000)], source="pack", mfu=0.5)
    assert keys(found) == ["model"] and "50 % of the peak" in advice_of(found)[0].text
    assert "bf16" not in advice_of(found)[0].how
    assert '"bf16"' in advice_of(replace(found, precision="fp32"))[0].how


def test_ranks_that_a_node_can_feed():
    """Of eight ranks that each want 8 of 4 cores, four do the same."""
    ranks = [make_rank(8000, 1000) for _ in range(8)]
    found = make(ranks, cores=4, source="pack", loader={"read": 0.1e-3, "fbank": 0.9e-3})
    (one,) = [one for one in advice_of(found) if one.key == "ranks"]
    assert one.value == 4 and one.gain == 1.0
    assert "ranks" not in keys(replace(found, cores=16))


def test_what_costs_nothing_goes_before_what_gains_the_same():
    threads = {1: Pace(1, 100, 1e-3), 4: Pace(4, 400, 1e-3)}
    found = make([make_rank(400, 100)], threads=threads, workers=1, loader={**LOADER_STAGES, "decode": 20e-3})
    assert keys(found)[:2] == ["threads", "pack"]


def test_what_a_stage_adds():
    paces = {"read": Pace(2, 2000, 1e-3), "decode": Pace(2, 500, 3e-3), "crop": Pace(2, 510, 2.9e-3)}
    added = marginal({**paces, "fbank": Pace(2, 400, 4e-3)})
    assert added["read"] == pytest.approx((1e-3, 1e-3)) and added["decode"] == pytest.approx((3e-3, 2e-3))
    assert added["crop"] == (0.0, 0.0)  # noise is no gain
    assert added["fbank"] == pytest.approx((1e-3, 1e-3))
    assert sum(seconds for seconds, _ in added.values()) == pytest.approx(2 / 400)


def test_a_rank_is_not_slow_within_what_is_uncertain():
    wide = [replace(make_rank(1000, rate), loader=around(rate, 0.4)) for rate in (3000, 2000)]
    assert v.slow_rank(make(wide)) is None
    assert v.slow_rank(make([make_rank(1000, 3000), make_rank(1000, 1900)])) is not None
    assert v.slow_rank(make([make_rank(1000, 3000), make_rank(1000, 2100)])) is None  # not worth a word
    steps = [make_rank(100, 3000, alone=alone) for alone in (0.02, 0.04)]
    assert v.slow_rank(make(steps))[0] == 1
    assert v.slow_rank(make([replace(rank, alone=around(rank.alone.value, 0.5)) for rank in steps])) is None
