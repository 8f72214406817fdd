"""A model as an ONNX file, that takes normalised features or the waveform itself."""

from __future__ import annotations

import json
import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastsskd_kernels as kernels
from fastsskd.errors import InputError
from fastsskd.inference.export import describe
from fastsskd.model import ACM
from fastsskd.patches import NUM_MEL_BINS, PATCH
from fastsskd.weights import ModelInfo

OPSET = 18
TOLERANCE = 1e-4
"""Largest difference between the file's answers and the model's that is accepted, of logits and features."""
INPUTS = ("fbank", "waveform")


class WaveformModel(nn.Module):
    """A model with its features inside, made of operations that every runtime has: no FFT, no strided views.

    A frame of 400 samples is five pieces of 80, and its spectrum one matrix product: DC removal, pre-emphasis, window,
    padding and Fourier transform are linear. In float64, as quiet bins are what is left of large numbers.

    Args:
        model: what hears the features.
        info: its clip length and normalisation.
    """

    spectrum: Tensor
    banks: Tensor

    def __init__(self, model: ACM, info: ModelInfo):
        super().__init__()
        self.model, self.mean, self.factor = model, info.mean, 0.5 / info.std
        self.num_samples = round(info.seconds * info.sample_rate)
        self.num_frames = kernels.num_frames(self.num_samples)
        self.padding = model.grid_size[0] * PATCH - self.num_frames
        spectrum, banks, self.floor = kernels.fbank_matrices(NUM_MEL_BINS)
        self.register_buffer("spectrum", spectrum)
        self.register_buffer("banks", banks)

    def forward(self, waveform: Tensor) -> tuple[Tensor | None, Tensor]:
        """``(B, S)`` float32 at 16 kHz, ``S`` = ``num_samples`` -> what the model gives."""
        return self.model(self.fbank(waveform))

    def fbank(self, waveform: Tensor) -> Tensor:
        """``(B, S)`` -> ``(B, T, F)`` normalised features, as ``kernels.features`` gives them."""
        length, shift = self.spectrum.shape[0], 160
        piece = 80  # divides both
        used = (self.num_frames - 1) * shift + length
        pieces = waveform[:, :used].double().unflatten(1, (used // piece, piece))
        step, last = shift // piece, (self.num_frames - 1) * (shift // piece)
        frames = torch.cat([pieces[:, i : i + last + 1 : step] for i in range(length // piece)], dim=-1)
        real, imaginary = (frames @ self.spectrum).chunk(2, dim=-1)
        mel = (real * real + imaginary * imaginary) @ self.banks
        fbank = mel.float().clamp(min=self.floor).log()
        return (nn.functional.pad(fbank, (0, 0, 0, self.padding)) - self.mean) * self.factor


def export_onnx(model: ACM, info: ModelInfo, file: str | Path, *, given: str = "fbank") -> float | None:
    """Write ``file`` and hold it against the model with onnxruntime, where that is installed.

    The input is ``fbank (B, T, F)``, normalised, or ``waveform (B, S)`` at 16 kHz; B is free. The outputs are
    ``logits (B, C)``, if the model has a head, and ``embedding (B, D)``. What the input and the classes are is in the
    file's metadata, under ``fastsskd``, as JSON.

    Args:
        given: what it takes, one of ``INPUTS``.

    Returns:
        The largest difference that was found; None without onnxruntime.

    Raises:
        InputError: packages are missing, the file cannot be written, or its answers are not the model's.
    """
    _require_packages()
    import onnx

    file = Path(file)
    module = model if given == "fbank" else WaveformModel(model, info)
    module = module.eval().requires_grad_(False)
    shape = (model.grid_size[0] * PATCH, NUM_MEL_BINS) if given == "fbank" else (module.num_samples,)
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)) * 0.1
    program = _trace(module, example, given, model.head is not None).model_proto
    about = describe(model, info) | {"takes": given, "gives": [output.name for output in program.graph.output]}
    onnx.helper.set_model_props(program, {"fastsskd": json.dumps(about)})
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(program, temporary)
        difference = _largest_difference(module, temporary, given, example[:1].repeat(3, *[1] * len(shape)))
        if difference is not None and not difference <= TOLERANCE:
            raise InputError(f"{file}: onnxruntime's answers differ from the model's by {difference:.2g}; not written")
        os.replace(temporary, file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror or error}); choose another --onnx") from None
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def _trace(module: nn.Module, example: Tensor, name: str, has_head: bool) -> torch.onnx.ONNXProgram:
    """The graph, with a free batch size."""
    outputs = ["logits", "embedding"] if has_head else ["embedding"]
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module if has_head else _EmbeddingAlone(module),
                (example,),
                input_names=[name],
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    return program


class _EmbeddingAlone(nn.Module):
    """A model without a head; ONNX has no None."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[1]


@torch.no_grad()
def _largest_difference(module: nn.Module, file: Path, name: str, example: Tensor) -> float | None:
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    expected = [output.numpy() for output in module(example) if output is not None]
    found = session.run(None, {name: example.numpy()})
    return max(float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True))


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(f"--onnx needs {' and '.join(missing)}: pip install 'fastsskd[onnx]'")
