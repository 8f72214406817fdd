"""`fastsskd profile` with a planted bottleneck, for test_profile.py: run on each of some ranks."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

WAIT = 0.08
"""Seconds: tens of times what anything else here costs a clip."""


ONE_BY_ONE = threading.Lock()
"""Of what more threads do not make faster, as a disk or a core that is busy."""


def _slow(owner, name: str, seconds, rank: int | None = None, lock=ONE_BY_ONE) -> None:
    """Let a function sleep before it does its work; ``seconds`` may be a function of its arguments."""
    function = getattr(owner, name)

    def slowed(*args, **kwargs):
        with lock:
            time.sleep(seconds(*args, **kwargs) if callable(seconds) else seconds)
        return function(*args, **kwargs)

    if rank is None or int(os.environ.get("RANK", "0")) == rank:
        setattr(owner, name, slowed)


def slow_disk() -> None:
    from fastsskd.clip_bytes import ClipBytes

    _slow(ClipBytes, "read_into", WAIT / 2)


def slow_features() -> None:
    import fastsskd_kernels

    _slow(fastsskd_kernels, "features", lambda waveform, **_: WAIT * len(waveform), lock=contextlib.nullcontext())


def slow_decoder() -> None:
    from fastsskd import clip_reader

    _slow(clip_reader.Decoder, "decode", lambda self, files: WAIT * len(files))


def heavy_resample() -> None:
    from fastsskd import stream
    from fastsskd.profile import stages as profile_stages

    for owner in (stream, profile_stages):
        owner.crop_in_place = lambda clip, crop: None
        _slow(owner, "crop_into", WAIT)


def slow_model() -> None:
    from fastsskd.pretrain import Pretrain

    _slow(Pretrain, "forward", 0.3)


def slow_rank() -> None:
    from fastsskd.pretrain import Pretrain

    _slow(Pretrain, "forward", 0.3, rank=1)


def slow_disk_of_a_rank() -> None:
    from fastsskd.clip_bytes import ClipBytes

    _slow(ClipBytes, "read_into", WAIT, rank=1)


def slow_teacher() -> None:
    from fastsskd.teachers.ours import OwnTeacher

    _slow(OwnTeacher, "forward", 0.3)


def slow_network() -> None:
    import torch.distributed as dist

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        _slow(dist, name, 0.1)


def nothing() -> None:
    pass


def profile(file: str, plant: str, *arguments: str) -> None:
    """What rank 0 prints with ``--json``, its exit code and the processes it left, in a file."""
    from fastsskd import cli

    globals()[plant]()
    file = file if os.environ.get("RANK", "0") == "0" else os.devnull
    with open(file, "w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        assert cli.main(["profile", "--json", *arguments]) == 0


def silent_collectives(file: str) -> None:
    """What collectives give with and without silence, on the last of some ranks."""
    import torch
    import torch.distributed as dist

    from fastsskd import distributed
    from fastsskd.profile.silence import silence

    distributed.start("cpu", 60)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def everything() -> dict[str, list[float]]:
        own = torch.tensor([1.0 + rank, 2.0 + rank])
        found = {"all_reduce": own.clone()}
        dist.all_reduce(found["all_reduce"])
        parts = [torch.empty(2) for _ in range(ranks)]
        dist.all_gather(parts, own)
        found["all_gather"] = torch.cat(parts)
        found["all_gather_into_tensor"] = torch.empty(2 * ranks)
        dist.all_gather_into_tensor(found["all_gather_into_tensor"], own)
        found["reduce_scatter_tensor"] = torch.empty(1)
        dist.reduce_scatter_tensor(found["reduce_scatter_tensor"], own)
        handle = dist.all_reduce(own, async_op=True)
        handle.wait()
        return {name: value.tolist() for name, value in found.items()}

    before = everything()
    with silence():
        silent = everything()
    assert everything() == before
    if rank == ranks - 1:
        Path(file).write_text(json.dumps({"before": before, "silent": silent}))
