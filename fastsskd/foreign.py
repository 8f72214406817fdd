"""Checkpoint files of other projects: opened without running anything in them, and what they look like.

A file comes from a download that failed, from another model, or from a stranger: each such case is one line that says
what the file is and what to do. Pickles are read with ``weights_only=True``, so nothing in them runs.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastsskd.errors import InputError

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the names of Hugging Face, before any other
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")  # under which trainers put the weights
_TORCH_PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # begins what torch.save wrote before version 1.6
_AGAIN = "download or copy it again"

# What the names of the weights begin with, most particular first: (kind of teacher or "", in words, names).
_MARKS = (
    (
        "ours",
        "a model of fastsskd, perhaps without the description in model.safetensors",
        ("patch_embed.weight", "mae.mask_token", "blocks.0."),
    ),
    ("ast", "AST, original layout", ("v.pos_embed", "v.dist_token", "v.blocks.0.")),
    ("ast", "AST, Hugging Face layout", ("audio_spectrogram_transformer.",)),
    ("ast", "AST, Hugging Face layout", ("embeddings.distillation_token", "embeddings.patch_embeddings.")),
    ("beats", "BEATs", ("patch_embedding.", "encoder.layers.0.self_attn.")),
    ("", "SSAST or another model built on AST", ("v.pos_embed", "v.blocks.0.")),
    ("", "PaSST", ("time_new_pos_embed", "freq_new_pos_embed")),
    ("", "CLAP", ("audio_branch.",)),
    ("", "CLAP", ("audio_model.", "text_model.")),
    ("", "HTS-AT", ("spectrogram_extractor.", "layers.0.blocks.0.attn.relative_position_bias_table")),
    ("", "PANNs", ("spectrogram_extractor.", "conv_block1.")),
    ("", "wav2vec 2.0, HuBERT or WavLM", ("feature_extractor.conv_layers.",)),
    ("", "wav2vec 2.0, Hugging Face layout", ("wav2vec2.",)),
    ("", "HuBERT, Hugging Face layout", ("hubert.",)),
    ("", "WavLM, Hugging Face layout", ("wavlm.",)),
    ("", "Whisper", ("encoder.conv1.", "decoder.token_embedding.")),
    ("", "Whisper, Hugging Face layout", ("model.encoder.conv1.", "model.decoder.")),
    ("", "a ViT for pictures, Hugging Face layout", ("vit.embeddings.",)),
    ("", "a DeiT for pictures, Hugging Face layout", ("deit.embeddings.",)),
    ("", "a ViT for pictures, Google's .npz", ("embedding/kernel", "Transformer/encoderblock_0/")),
    ("", "a ResNet for pictures", ("conv1.weight", "bn1.", "layer1.0.")),
)


def checkpoint_file(path: str | Path) -> Path:
    """The file of weights at ``path``: itself, or the one in that folder.

    Raises:
        InputError: there is none, or a folder holds several or one in parts.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"checkpoint {path}: no such file or folder; check the path")
    for name in _WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    parts = sorted(path.glob("*.index.json"))
    if parts:
        raise InputError(f"checkpoint {path}: the weights are in parts ({parts[0].name}); save them as one file")
    if not found:
        raise InputError(
            f"checkpoint {path}: a folder without a file of weights ({', '.join(_WEIGHT_FILES)}, .pt, .pth); give one"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
        raise InputError(f"checkpoint {path}: a folder with several files of weights ({names}); give one of them")
    return found[0]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What ``.safetensors``, ``.npz`` or a file of ``torch.save`` holds, on the CPU; a folder stands for its one file.

    The tensors may still lie in the file: copy what is kept.

    Returns:
        The outermost dictionary: of weights, or of those and what a trainer put beside them. See :func:`weights_in`.

    Raises:
        InputError: no such file, not a checkpoint (with what it is instead), cut off, damaged, or a pickle that needs
            code to be run.
    """
    path = checkpoint_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
        _refuse_what_is_no_checkpoint(path, head)
        if head[8:9] == b"{":
            return _load_safetensors(path)
        if not head.startswith((b"PK\x03\x04", _TORCH_PICKLE)):
            is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
            kind = "a pickle that PyTorch did not write" if is_pickle else "of an unknown format"
            raise InputError(f"checkpoint {path}: {kind}; expected .safetensors, .npz, or a .pt or .pth of torch.save")
        if head.startswith(b"PK") and _is_npz(path):
            return _load_npz(path)
        return _load_torch(path, is_zip=head.startswith(b"PK"))
    except OSError as error:
        raise InputError(f"checkpoint {path}: cannot be read ({error.strerror or error})") from None


def weights_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, without what trainers wrap around them: ``{"model": ...}``, DataParallel's ``module.``."""
    for wrapper in _WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            return weights_in(state[wrapper])
    weights = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def beside_weights(state: Mapping[str, Any]) -> list[str]:
    """Names of what trainers put beside the weights of :func:`weights_in`: epochs, arguments, optimizer state."""
    wrapper = next((name for name in _WRAPPERS if isinstance(state.get(name), Mapping)), None)
    if wrapper is None:
        return [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    return [str(name) for name in state if name != wrapper] + beside_weights(state[wrapper])


def recognise(weights: Mapping[str, Tensor]) -> tuple[str, str]:
    """Which model the weights are of, by their names: the kind of teacher (``""`` = none) and the model in words."""
    for kind, words, marks in _MARKS:
        if all(any(name.startswith(mark) for name in weights) for mark in marks):
            return kind, words
    patches = weights.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 4 and "blocks.0.attn.qkv.weight" in weights:
        if patches.shape[1] != 1:
            return "", "a ViT or MAE for pictures"
        return "audiomae", "AudioMAE" + ("" if "head.weight" in weights else ", pre-trained only")
    if not weights:
        return "", "a file without weights"
    return "", f"an unknown model, with {len(weights)} tensors such as {next(iter(weights))[:80]!r}"


def _refuse_what_is_no_checkpoint(path: Path, head: bytes) -> None:
    """Raise for the usual results of a download that failed, by the file's first bytes."""
    text, about = head.lstrip(), ""
    if not head:
        about = f"empty; {_AGAIN}"
    elif head.startswith(b"version https://git-lfs"):
        about = "a Git LFS pointer, not the weights; run `git lfs pull` in its repository, or download the file itself"
    elif text[:9].lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        about = "a web page, not the weights; the link led to a login or an error page: download the file itself"
    elif head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")) or head[257:262] == b"ustar":
        about = "an archive; unpack it, and give the file of weights in it"
    elif text[:16].isascii() and b"".join(text[:16].split()).decode().isprintable():
        about = f"text that begins {text[:40].decode(errors='replace').splitlines()[0]!r}, not weights; {_AGAIN}"
    if about:
        raise InputError(f"checkpoint {path}: {about}")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        there, whole = path.stat().st_size, _safetensors_size(path)
        if whole is not None and there < whole:
            reason = f"cut off, {there:,} bytes of {whole:,}"
        else:
            reason = f"not a safetensors file, or damaged ({str(error).splitlines()[0][:100]})"
        raise InputError(f"checkpoint {path}: {reason}; {_AGAIN}") from None


def _safetensors_size(path: Path) -> int | None:
    """Bytes that the file should have, as far as its header goes; None if it is not such a file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file.read(1) != b"{" or length > 100_000_000:  # the format's own limit
            return None
        header = b"{" + file.read(length - 1)
    if len(header) < length:
        return 8 + length
    try:
        ends = [about["data_offsets"][1] for name, about in json.loads(header).items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def _load_torch(path: Path, is_zip: bool) -> dict[str, Any]:
    """A file of ``torch.save``, in today's format (a zip archive) or in that before PyTorch 1.6."""
    if is_zip:
        _check_archive(path)
    try:
        # MAE's trainers keep their command line in the file: plain values, in a class that cannot do anything.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise InputError(f"checkpoint {path}: cut off or damaged ({type(error).__name__}); {_AGAIN}") from None
        raise InputError(
            f"checkpoint {path}: holds more than weights alone: it would run {code[1]}, which is refused; where it "
            "came from, save model.state_dict() as safetensors or with torch.save"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"checkpoint {path}: holds a {type(state).__name__}, not a dictionary of weights")
    return state


def _is_npz(path: Path) -> bool:
    """Whether a zip archive holds NumPy's arrays and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _load_npz(path: Path) -> dict[str, Tensor]:
    """NumPy's arrays by name. NumPy unpickles nothing: arrays of Python objects are refused."""
    state, name = {}, ""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                found = arrays[name]
                if found.dtype.kind not in "fiub" or not found.dtype.isnative:
                    raise InputError(f"checkpoint {path}: {name} holds {found.dtype}, not numbers that can be weights")
                state[name] = torch.from_numpy(found)
    except InputError:
        raise
    except Exception as error:  # a damaged header can raise anything
        if "allow_pickle" in str(error):
            raise InputError(
                f"checkpoint {path}: {name} holds Python objects, which would run code and are refused; save its "
                "arrays of numbers alone"
            ) from None
        raise InputError(f"checkpoint {path}: cut off or damaged ({type(error).__name__}); {_AGAIN}") from None
    return state


def _check_archive(path: Path) -> None:
    """Raise unless a zip archive is whole and one of ``torch.save``."""
    if not zipfile.is_zipfile(path):  # the table of contents is at the end
        raise InputError(f"checkpoint {path}: cut off, its end is missing; {_AGAIN}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise InputError(f"checkpoint {path}: damaged ({error}); {_AGAIN}") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(f"checkpoint {path}: a TorchScript program, not weights alone; save its state_dict() instead")
    if not any(name.endswith("/data.pkl") for name in names):
        inside = f"with {names[0]!r} in it" if names else "with nothing in it"
        raise InputError(f"checkpoint {path}: a zip archive {inside}, not one that PyTorch wrote; unpack it first")
