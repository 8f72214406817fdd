"""How far are the kernels from the limit, and from what people use today?

    python benchmarks/kernels.py              # every CPU part, and the GPU part where there is one
    python benchmarks/kernels.py --rounds 9   # quicker, rougher

One process, one thread for everybody unless a row says otherwise. Every row of a table is timed once per round, round
after round, so that a busy machine slows all of them; a cell is the median over rounds of the time for one 10 s clip at
16 kHz. Before anything is timed, each candidate's output is compared with torchaudio's or scikit-image's: a fast wrong
kernel is not in the table. Results go to ``benchmarks/results/kernels.json`` and ``kernels.md``.

How to read it: ``torch.fft.rfft`` of the 998 windowed frames alone is one part of the work, done by MKL; no fbank on top
of it can be faster than that row. ``rounding`` in DALI's row is not rounding: its features are not Kaldi's.
"""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before NumPy and torch start their pools

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import kernels_gpu
import kernels_peers as peers
import numpy as np
import torch

import fastsskd_kernels as kernels
from fastsskd_kernels import fbank_cpu
from fastsskd_kernels.fbank import fbank_torch
from fastsskd_kernels.simd import LANES

RESULTS = Path(__file__).parent / "results"
SAMPLES, BATCH, PATCHES = 160_000, 64, 512
