"""A checkpoint that answers at once, and recordings for it."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from fastsskd.model import build_model
from fastsskd.weights import ModelInfo, save_model

SECONDS = 0.96
CLASSES = ("cat", "dog", "owl", "bee")


def save_checkpoint(folder: Path, *, seed: int = 0, classes=CLASSES, **about) -> Path:
    """Write a model whose head is random with biases, so that its classes differ; returns its folder."""
    info = ModelInfo(
        "nano", tuple(classes), **{"multi_label": False, "seconds": SECONDS, "mean": -4.0, "std": 4.5} | about
    )
    how = {"attention": info.attention, "pooling": info.pooling}
    model = build_model(info.size, len(classes), seconds=info.seconds, seed=seed, **how)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if model.head is not None:
            model.head[1].weight.normal_(0.0, 0.5, generator=random)
            model.head[1].bias.normal_(0.0, 0.5, generator=random)
    save_model(folder / "model.safetensors", model.state_dict(), info)
    return folder


def sound(seconds: float, rate: int = 16000, seed: int = 0, channels: int = 1) -> np.ndarray:
    """Tones that come and go, `(S, channels)` float64; each half second is another."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = random.uniform(200, 3000, int(seconds * 2) + 1)[(time * 2).astype(int)]
    mono = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.01 * random.standard_normal(len(time))
    return np.repeat(mono[:, None], channels, axis=1)


def save_sound(path: Path, seconds: float, rate: int = 16000, seed: int = 0, channels: int = 1) -> Path:
    """Write `sound` in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(seconds, rate, seed, channels), rate)
    return path
