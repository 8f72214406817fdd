"""What a machine is and can do: the cards that `fastsskd plan` knows, from their makers' data sheets.

A node is the maker's own server of eight: DGX-1V (4 x 100 Gb/s InfiniBand, 40 cores), DGX A100 (8 x 200 Gb/s, 128
cores), DGX H100 and H200 (8 x 400 Gb/s, 112 cores).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """One card and its place in a node.

    Attributes:
        name: as ``--gpu`` takes it.
        matrix16, matrix32: FLOP/s of dense matrix products in 16 bits on the matrix units, and in float32 without them
            (torch's default: no TF32).
        memory: bytes. bandwidth: of it, bytes a second.
        link: bytes a second from one GPU to its neighbours in the node, one direction.
        network: bytes a second out of a node, all its adapters, one direction.
        cores: of the CPUs of a node, for all its GPUs.
        share: of ``matrix16`` that the model's products reach with everything between them. An assumption: none of
            these cards was measured.
        has_bf16: whether it computes in bfloat16.
        source: where the figures are from.
    """

    name: str
    matrix16: float
    matrix32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    cores: int
    share: float
    has_bf16: bool
    source: str


def _v100(name: str, memory: float) -> Gpu:
    sheet = "NVIDIA V100 data sheet (SXM2), DGX-1V"
    return Gpu(name, 125e12, 15.7e12, memory, 900e9, 150e9, 50e9, 40, 0.35, False, sheet)


def _a100(name: str, memory: float, bandwidth: float) -> Gpu:
    sheet = "NVIDIA A100 data sheet (SXM4), DGX A100"
    return Gpu(name, 312e12, 19.5e12, memory, bandwidth, 300e9, 200e9, 128, 0.40, True, sheet)


def _hopper(name: str, memory: float, bandwidth: float, share: float) -> Gpu:
    # The H100 and the H200 differ in memory alone; the less of it a FLOP has, the longer norms and GELUs take.
    sheet = f"NVIDIA {name} data sheet (SXM5, without sparsity), DGX {name}"
    return Gpu(name, 989.4e12, 67e12, memory, bandwidth, 450e9, 400e9, 112, share, True, sheet)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _v100("V100-16", 16e9),
        _v100("V100-32", 32e9),
        _a100("A100-40", 40e9, 1555e9),
        _a100("A100-80", 80e9, 2039e9),
        _hopper("H100", 80e9, 3350e9, 0.30),
        _hopper("H200", 141e9, 4800e9, 0.35),
    )
}


def find(name: str) -> Gpu | None:
    """The card that a driver calls ``name``, such as ``"NVIDIA H200"``; None if it is none of ours."""
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in name), None)


def cpu_name() -> str:
    """Of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())
