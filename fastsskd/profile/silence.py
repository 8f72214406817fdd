"""Collectives that send nothing: what a step takes without them is what it does not spend on communication.

A rank alone goes at its own pace, so this also tells which rank is slow, and not which one waits for it. Each
collective leaves this rank's own numbers where the others' would be, so that the step goes on with finite ones; a model
that was trained like that is good for nothing but its speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist


class _Done:
    """Stands where the handle of an asynchronous collective would."""

    def wait(self, *args: Any) -> bool:
        return True

    is_completed = is_success = synchronize = wait

    def get_future(self) -> None:
        return None


def _keep(*args: Any, **kwargs: Any) -> _Done:
    """Of those that work in place."""
    return _Done()


def _all_gather(tensor_list: Any, tensor: Any, *args: Any, **kwargs: Any) -> _Done:
    own = tensor.clone()  # here and below: what is sent may be a part of what is received
    for part in tensor_list:
        part.copy_(own)
    return _Done()


def _all_gather_into(output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> _Done:
    output_tensor.view(-1, input_tensor.numel()).copy_(input_tensor.reshape(1, -1).clone())
    return _Done()


def _reduce_scatter(output: Any, input_list: Any, *args: Any, **kwargs: Any) -> _Done:
    output.copy_(input_list[dist.get_rank()].clone())
    return _Done()


def _reduce_scatter_tensor(output: Any, input: Any, *args: Any, **kwargs: Any) -> _Done:
    output.copy_(input.reshape(-1, output.numel())[dist.get_rank()].view_as(output).clone())
    return _Done()


def _scatter(tensor: Any, scatter_list: Any = None, *args: Any, **kwargs: Any) -> _Done:
    if scatter_list:
        tensor.copy_(scatter_list[dist.get_rank()].clone())
    else:
        tensor.zero_()
    return _Done()


def _all_to_all(output_tensor_list: Any, input_tensor_list: Any, *args: Any, **kwargs: Any) -> _Done:
    for out, own in zip(output_tensor_list, input_tensor_list, strict=True):
        out.copy_(own)
    return _Done()


SILENT = {
    "all_reduce": _keep,
    "all_reduce_coalesced": _keep,
    "broadcast": _keep,
    "reduce": _keep,
    "barrier": _keep,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "scatter": _scatter,
    "all_to_all": _all_to_all,
}
# DeepSpeed looks these two up once, when it starts; the names are its own, setup.py pins the version.
_KEPT = {"all_gather_function": _all_gather_into, "reduce_scatter_function": _reduce_scatter_tensor}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Within it, torch's and DeepSpeed's collectives of this process send nothing."""
    from deepspeed.comm import comm

    places = [(dist, name, silent) for name, silent in SILENT.items()]
    places += [(comm.cdb, name, silent) for name, silent in _KEPT.items() if comm.cdb is not None]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, silent in places:
            setattr(owner, name, silent)
        yield
    finally:
        for owner, name, real in before:
            setattr(owner, name, real)
