"""What every test may ask for: small clips with real features, a small model, a watch on the device's queue."""

import functools
from collections.abc import Iterable

import hypothesis
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import ForkedTraining, save_tones

import fastsskd_kernels as kernels
from fastsskd import manifest
from fastsskd.batch import Batch
from fastsskd.layouts import index as layouts
from fastsskd.model import build_model
from fastsskd.patches import num_input_frames

# The same examples on every machine and every run; no verdict ever depends on how busy the machine is.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("repeatable")

# Small tensors gain nothing from threads, and on a busy machine the threads' waiting for each other costs twenty times
# the work. Processes that a test starts decide for themselves.
torch.set_num_threads(1)

SECONDS = 0.96
"""94 frames, padded to 96: a grid of 6 x 8 patches."""


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever a test has run in this process: others compare digit by digit, and fork."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_batch():
    """A function that makes a batch of any clips; a clip's content and seed follow from its number alone."""
    return _make_batch


def _make_batch(
    numbers: Iterable[int] = (0, 1, 2, 3, 4),
    *,
    seconds: float = SECONDS,
    num_classes: int = 4,
    multi_label: bool = False,
    seed: int = 0,
    epoch: int = 0,
    waveform: bool = False,
) -> Batch:
    numbers = list(numbers)
    waves, fbank, hog = (torch.stack(parts) for parts in zip(*(_clip(n, seconds) for n in numbers), strict=True))
    if multi_label:
        hot = [np.random.default_rng((7, number)).random(num_classes) < 0.4 for number in numbers]
        label = torch.tensor(np.array(hot), dtype=torch.float32)
    else:
        label = torch.tensor([number % num_classes for number in numbers])
    index = np.array(numbers, np.int64)
    seeds = torch.from_numpy(kernels.derive_seeds(seed, epoch, index))
    keys = [f"clip{number}" for number in numbers]
    return Batch(fbank, hog, label, keys, torch.from_numpy(index), seeds, waves if waveform else None)


@functools.cache
def _clip(number: int, seconds: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Waveform, fbank and HOG of a tone that comes and goes in noise, all of it drawn from ``number``."""
    random = np.random.default_rng((3, number))
    time = np.arange(round(seconds * 16000)) / 16000
    envelope = np.exp(-(((time - random.uniform(0.2, 0.8) * seconds) / (0.2 * seconds)) ** 2))
    tone = 0.4 * envelope * np.sin(2 * np.pi * random.uniform(200, 5000) * time)
    wave = torch.from_numpy((tone + 0.02 * random.standard_normal(len(time))).astype(np.float32))
    fbank, hog = kernels.features(wave[None], num_frames=num_input_frames(seconds), backend="torch")
    return wave, fbank[0], hog[0]


@pytest.fixture
def make_model():
    """A function that builds the smallest model for ``make_batch``'s clips."""

    def make(size: str = "nano", num_classes: int = 4, *, seconds: float = SECONDS, **options):
        return build_model(size, num_classes, seconds=seconds, **options)

    return make


class NoWaiting(TorchDispatchMode):
    """Fails on any operation that would make the host wait for a GPU: reading a value, or a shape made of values."""

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_waiting():
    return NoWaiting


@pytest.fixture(scope="session")
def training(tmp_path_factory):
    """Starts trainings in processes of their own, see ``training.py``."""
    with ForkedTraining(tmp_path_factory.mktemp("logs")) as forked:
        yield forked


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """Manifest of 40 clips of 0.96 s in 2 classes, low and high tones."""
    folder = tmp_path_factory.mktemp("clips")
    save_tones(folder)
    path = tmp_path_factory.mktemp("tables") / "tones.manifest"
    manifest.save(layouts.build(folder), path)
    return path
