"""A checkpoint -> a folder to give away: weights, and a page that says what they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy
import torch

from fastsskd import __version__, durable
from fastsskd.errors import InputError
from fastsskd.model import ACM
from fastsskd.patches import NUM_MEL_BINS, PATCH
from fastsskd.weights import MODEL_FILE, ModelInfo, load_model, save_model

CONFIG_FILE = "config.json"


def export_folder(model: ACM, info: ModelInfo, out: str | Path, *, half: bool = False) -> Path:
    """Write ``model.safetensors`` and ``config.json``; the folder is loaded like any checkpoint.

    The header of the weights' file alone is read back: ``config.json`` says the same for people and other programs.

    Args:
        out: folder, made if it is not there.
        half: 16-bit weights: half the size, logits differ in the third digit.

    Returns:
        The weights' file.

    Raises:
        InputError: the folder cannot be written.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_model(out / MODEL_FILE, model.state_dict(), info, torch.float16 if half else torch.float32)
        about = describe(model, info) | {
            "dtype": "float16" if half else "float32",
            "weights": MODEL_FILE,
            "sha256": durable.sha256(out / MODEL_FILE),
        }
        durable.write_text(out / CONFIG_FILE, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None
    return out / MODEL_FILE


def describe(model: ACM, info: ModelInfo) -> dict[str, Any]:
    """All that is needed to use the weights in another program: shapes, input, classes, licence, versions."""
    return {
        "model": "ACM-SSKD",
        "licence": info.licence,
        "classes": list(info.classes),
        "activation": "sigmoid" if info.multi_label else "softmax",
        "input": {
            "sample_rate": info.sample_rate,
            "seconds": info.seconds,
            "num_samples": round(info.seconds * info.sample_rate),
            "shorter_clips": "looped",
            "features": "Kaldi fbank: Hann window of 25 ms, step of 10 ms, no dither, waveform in [-1, 1)",
            "num_mel_bins": NUM_MEL_BINS,
            "num_frames": model.grid_size[0] * PATCH,
            "mean": info.mean,
            "std": info.std,
            "normalisation": "(fbank - mean) / (2 * std), zero-padded to num_frames before",
        },
        "architecture": {
            "size": info.size,
            **dataclasses.asdict(model.size),
            "attention": info.attention,
            "pooling": info.pooling,
            "patch": PATCH,
            "grid_size": list(model.grid_size),
            "num_parameters": model.num_parameters().total,
        },
        "versions": {"fastsskd": __version__, "torch": torch.__version__, "numpy": numpy.__version__},
    }


def open_checkpoint(path: str | Path, licence: str | None = None) -> tuple[ACM, ModelInfo]:
    """A checkpoint to export; ``licence`` replaces its own.

    Raises:
        InputError: not a model of ours.
    """
    model, info = load_model(path)
    return model, info if licence is None else dataclasses.replace(info, licence=licence)
