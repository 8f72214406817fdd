"""Batches' memory is used again, and never while anybody can see it."""

import gc
import weakref

import torch

from fastsskd.recycle import Recycler


def test_forgotten_memory_is_used_again_and_held_memory_is_not():
    memory = Recycler()
    first = memory.empty(4, 100)
    place = first.data_ptr()
    row = first[2]
    row.fill_(7.0)
    del first  # a view still holds it
    second = memory.empty(4, 100)
    assert second.data_ptr() != place
    second.fill_(0.0)
    assert (row == 7.0).all()
    del row
    third = memory.empty(400)
    assert third.data_ptr() == place and third.shape == (400,) and third.dtype == torch.float32


def test_memory_begins_where_a_cache_line_does():
    memory = Recycler()
    held = [memory.empty(size) for size in (1, 7, 100, 4097, 1 << 20)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in held)


def test_numpy_views_and_autograd_hold_it_too():
    memory = Recycler()
    a = memory.empty(8)
    array, weight = a.numpy(), torch.ones(8, requires_grad=True)
    a.fill_(3.0)
    loss = (weight * a).sum()
    place = a.data_ptr()
    del a
    assert memory.empty(8).data_ptr() != place
    del array
    assert memory.empty(8).data_ptr() != place  # kept for the backward pass
    loss.backward()
    assert weight.grad.tolist() == [3.0] * 8
    del loss
    gc.collect()
    assert place in {tensor.data_ptr() for tensor in [memory.empty(8) for _ in range(4)]}


def test_empty_shapes_and_other_sizes():
    memory = Recycler()
    assert memory.empty(0, 5, 3).shape == (0, 5, 3)
    a, b = memory.empty(3), memory.empty(4)
    assert a.numel() == 3 and b.numel() == 4


def test_nothing_is_kept_when_all_is_forgotten():
    memory = Recycler()
    tensor = memory.empty(10)
    reference = weakref.ref(memory)
    del memory
    assert reference() is None
    tensor.fill_(1.0)  # outlives its recycler
    assert tensor.sum() == 10
