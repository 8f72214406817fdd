"""Which clip next: each clip once, the same step on any number of ranks, and a place to continue from."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsskd.clip_columns import from_columns
from fastsskd.sampler import Sampler, balanced_weights


def ranks_of(num_clips: int, world_size: int, batch_size: int, **options) -> list[Sampler]:
    options = {"shuffle": True, "seed": 0, **options}
    return [
        Sampler(num_clips, batch_size=batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def steps_of(samplers: list[Sampler], epoch: int = 0, position: int = 0) -> list[tuple[list[np.ndarray], int]]:
    """Each global batch: the ranks' shares and the position after it, which all ranks must agree on."""
    steps = []
    for shares in zip(*(sampler.batches(epoch, position) for sampler in samplers), strict=True):
        positions = {after for _, after in shares}
        assert len(positions) == 1
        steps.append(([share for share, _ in shares], positions.pop()))
    return steps


@given(
    num_clips=st.integers(1, 97),
    world_size=st.sampled_from([1, 2, 3, 5]),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    epoch=st.integers(0, 5),
)
def test_each_clip_exactly_once_an_epoch(num_clips, world_size, batch_size, shuffle, epoch):
    samplers = ranks_of(num_clips, world_size, batch_size, shuffle=shuffle)
    steps = steps_of(samplers, epoch)
    drawn = np.concatenate([share for shares, _ in steps for share in shares])
    assert sorted(drawn.tolist()) == list(range(num_clips))
    assert len(steps) == math.ceil(num_clips / (batch_size * world_size))
    assert all(sampler.num_batches() == len(steps) for sampler in samplers)
    for shares, _ in steps[:-1]:
        assert all(len(share) == batch_size for share in shares)
    tail = [len(share) for share in steps[-1][0]]
    assert max(tail) - min(tail) <= 1 and max(tail) <= batch_size
    assert steps[-1][1] == num_clips


@given(num_clips=st.integers(30, 200), epoch=st.integers(0, 3))
def test_a_step_s_clips_do_not_depend_on_the_number_of_ranks(num_clips, epoch):
    """30 clips a step: on 1, 2, 3 or 5 ranks, in one go or accumulated over several micro-batches."""
    expected = None
    for world_size in (1, 2, 3, 5):
        for accumulation in (1, 2, 3):
            if 30 % (world_size * accumulation):
                continue
            samplers = ranks_of(num_clips, world_size, 30 // world_size // accumulation, drop_last_to=30)
            flat = [np.concatenate(shares) for shares, _ in steps_of(samplers, epoch)]
            steps = [
                sorted(np.concatenate(flat[i : i + accumulation]).tolist()) for i in range(0, len(flat), accumulation)
            ]
            expected = expected or steps
            assert steps == expected


@given(
    num_clips=st.integers(1, 97),
    before=st.tuples(st.sampled_from([1, 2, 3, 5]), st.integers(1, 7)),
    after=st.tuples(st.sampled_from([1, 2, 3, 5]), st.integers(1, 7)),
    stop=st.integers(0, 20),
)
def test_an_epoch_goes_on_with_other_ranks_and_batches(num_clips, before, after, stop):
    first = steps_of(ranks_of(num_clips, *before))[:stop]
    position = first[-1][1] if first else 0
    rest = steps_of(ranks_of(num_clips, *after), position=position)
    assert ranks_of(num_clips, *after)[0].num_batches(position) == len(rest)
    drawn = [clip for shares, _ in first + rest for share in shares for clip in share.tolist()]
    assert sorted(drawn) == list(range(num_clips))
    order = Sampler(num_clips, batch_size=1, shuffle=True, seed=0).order(0)
    assert set(drawn[:position]) == set(order[:position].tolist())


def test_the_order_is_new_each_epoch_and_comes_from_the_seed():
    def order(seed, epoch, **options):
        return ranks_of(100, 1, 4, seed=seed, **options)[0].order(epoch).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    assert order(0, 3, shuffle=False) == list(range(100))


@given(num_clips=st.integers(8, 97), drop=st.integers(1, 8), shuffle=st.booleans())
def test_the_tail_is_dropped_to_whole_batches(num_clips, drop, shuffle):
    sampler = ranks_of(num_clips, 1, drop, drop_last_to=drop, shuffle=shuffle)[0]
    batches = [share for share, _ in sampler.batches(0)]
    assert len(batches) == sampler.num_batches() == num_clips // drop
    assert all(len(batch) == drop for batch in batches)
    assert len(set(np.concatenate(batches).tolist())) == num_clips // drop * drop


def test_other_clips_are_dropped_in_other_epochs():
    sampler = ranks_of(11, 1, 5, drop_last_to=5)[0]
    dropped = [set(range(11)) - set(sampler.order(epoch).tolist()) for epoch in range(20)]
    assert len(set.union(*dropped)) > 5


# ------------------------------------------------------------------------------------------------------------ weights


def test_weights_are_drawn_with_replacement_in_proportion():
    weights = np.array([0.0, 1.0, 2.0, 5.0])
    sampler = Sampler(4, batch_size=1, shuffle=True, seed=0, weights=weights)
    draws = np.concatenate([sampler.order(epoch) for epoch in range(2000)])
    assert len(draws) == 8000
    counts = np.bincount(draws, minlength=4)
    assert counts[0] == 0
    assert counts[1:] / 8000 == pytest.approx([0.125, 0.25, 0.625], abs=0.02)


def test_weighted_epochs_are_shared_out_alike():
    weights = np.arange(1.0, 31.0)
    one = steps_of(ranks_of(30, 1, 6, weights=weights))
    three = steps_of(ranks_of(30, 3, 2, weights=weights))
    assert [np.concatenate(shares).tolist() for shares, _ in one] == [
        np.concatenate(shares).tolist() for shares, _ in three
    ]


def table(labels, num_classes):
    """A manifest of clips with these labels."""
    lists = pa.array(labels, pa.list_(pa.int16()))
    paths = pa.array([f"{i}.wav" for i in range(len(labels))])
    classes = tuple(f"class{c}" for c in range(num_classes))
    return from_columns(paths, root=Path("/nowhere"), labels=lists, classes=classes, multi_label=True)


def test_balanced_weights_are_audioset_s():
    common, middle, rare = 1000 / 3.01, 1000 / 2.01, 1000 / 1.01
    expected = [common, common + middle, common, rare + middle]
    assert balanced_weights(table([[0], [0, 1], [0], [2, 1]], 4)) == pytest.approx(expected)


def test_balanced_weights_of_a_clip_without_labels_are_zero():
    weights = balanced_weights(table([[0], []], 1))
    assert weights[0] > 0 and weights[1] == 0
