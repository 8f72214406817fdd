"""Windows: the same whatever the blocks, each sample where it belongs, no more held than a window and a block."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsskd.inference.windows import SMALLEST_REST, Cut


def expected(total: int, cut: Cut) -> list[tuple[int, int]]:
    """Starts and ends, from the definition."""
    if total <= cut.length:
        return [(0, total)]
    if not cut.hop:
        return [(0, cut.length)]
    starts = list(range(0, total - cut.length + 1, cut.hop))
    uncovered = total - max(starts[-1] + cut.length, starts[-1] + cut.hop)
    if uncovered >= SMALLEST_REST * cut.length:
        starts.append(total - cut.length)
    return [(start, start + cut.length) for start in starts]


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 80), st.lists(st.integers(1, 90), max_size=20))
def test_windows_are_those_of_the_definition_for_any_blocks(total, length, hop, sizes):
    samples = np.arange(total, dtype=np.float32)
    ends = np.minimum(np.cumsum([*sizes, total]), total)
    blocks = [block for block in np.split(samples, ends) if len(block)]
    cut = Cut(length, hop)
    found = list(cut.windows(iter(blocks)))
    assert [(start, start + len(window)) for start, window in found] == expected(total, cut)
    for start, window in found:
        np.testing.assert_array_equal(window, samples[start : start + len(window)])


def test_a_recording_of_any_length_is_never_held_whole():
    blocks, length = 3000, 1000
    tracemalloc.start()
    for _ in Cut(3 * length, length).windows(np.zeros(length, np.float32) for _ in range(blocks)):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * length * 4 < blocks * length * 4 / 50


@pytest.mark.parametrize(("total", "more"), [(1000, 0), (5000, 1)])
def test_only_the_first_window_reads_one_block_more(total, more):
    taken = []

    def blocks():
        for begin in range(0, total, 1000):
            taken.append(begin)
            yield np.zeros(min(1000, total - begin), np.float32)

    assert len(list(Cut(1000, 0).windows(blocks()))) == 1
    assert len(taken) == 1 + more
