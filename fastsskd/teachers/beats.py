"""BEATs checkpoints (github.com/microsoft/unilm, beats/) as teachers: pre-trained or fine-tuned, any iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastsskd_kernels as kernels
from fastsskd.errors import InputError
from fastsskd.foreign import recognise, weights_in
from fastsskd.patches import NUM_MEL_BINS
from fastsskd.teachers.beats_model import ACTIVATIONS, Beats, BeatsConfig

FBANK_MEAN, FBANK_STD = 15.41663, 6.55582
FULL_SCALE = 32768.0
"""BEATs' features are of 16-bit samples, which are ours times 2^15; the floor of the log is absolute, so it matters."""

_TRAINING_ONLY = {
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "dropout_input",
    "layer_wise_gradient_decay_ratio",
    "predictor_dropout",
}
_MOST = 100_000  # of anything that a cfg counts
_EXPECTED = "expected a published one such as BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt"
_SHARED_BIAS = "self_attn.relative_attention_bias.weight"
_CONVOLUTION = "encoder.pos_conv.0."
_WEIGHT_NORM = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


class BeatsTeacher(nn.Module):
    """BEATs behind the teacher protocol, for clips of any length from one patch (0.175 s) on.

    Fine-tuned: scores are the probabilities of the classes. Pre-trained: no classes, features only.
    """

    score_kind = "probs"

    def __init__(self, model: Beats, config: BeatsConfig, classes: tuple[str, ...] = ()):
        super().__init__()
        self.model, self.classes, self.embed_dim = model.eval().requires_grad_(False), classes, config.encoder_embed_dim
        self.min_frames = config.input_patch_size

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, S)`` waveform at 16 kHz -> probabilities ``(B, C)`` and clip features ``(B, D)``, float32.

        C is 0 for a pre-trained model.

        Raises:
            InputError: clips shorter than one patch.
        """
        features = self._encode(waveform).mean(dim=1)
        if self.model.predictor is None:
            return features.new_zeros(len(features), 0, dtype=torch.float32), features.float()
        # BEATs takes the mean of the tokens' logits, which is the logits of their mean.
        return self.model.predictor(features).float().sigmoid(), features.float()

    @torch.no_grad()
    def tokens(self, waveform: Tensor) -> Tensor:
        """``(B, S)`` waveform at 16 kHz -> ``(B, N, D)`` float32, time-major: 8 mel patches for every 16 frames.

        Raises:
            InputError: clips shorter than one patch.
        """
        return self._encode(waveform).float()

    def _encode(self, waveform: Tensor) -> Tensor:
        if kernels.num_frames(waveform.shape[1]) < self.min_frames:
            raise InputError(
                f"teacher: BEATs needs {self.min_frames} frames of 10 ms, it cannot hear "
                f"{waveform.shape[1] / 16000:g} s; raise data.seconds"
            )
        # Of the two backends, this one rounds as the features that BEATs was trained on; it costs a CPU 5 ms a clip.
        scaled = waveform.float() * FULL_SCALE
        fbank = kernels.fbank(scaled, num_mel_bins=NUM_MEL_BINS, window="povey", backend="torch")
        return self.model((fbank - FBANK_MEAN) / (2 * FBANK_STD))

    def train(self, mode: bool = True) -> BeatsTeacher:
        """Stays in evaluation mode."""
        return super().train(False)


def from_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> BeatsTeacher:
    """The teacher in an opened checkpoint ``{"cfg": {...}, "model": {...}}``, with ``"label_dict"`` if fine-tuned.

    Raises:
        InputError: not of BEATs, weights that are not its cfg's, or a cfg that asks for what is not implemented here.
    """
    weights = weights_in(checkpoint)
    if not all(isinstance(checkpoint.get(part), Mapping) for part in ("cfg", "model")):
        raise InputError(
            f"teacher {path}: looks like {recognise(weights)[1]}; a BEATs checkpoint holds 'cfg' and 'model': "
            + _EXPECTED
        )
    if any(name.startswith("quantize") for name in weights):
        raise InputError(f"teacher {path}: a BEATs tokenizer, which is no teacher; {_EXPECTED}")
    config = read_config(checkpoint["cfg"], path)
    # Before a model of a wrong depth is built.
    if f"encoder.layers.{config.encoder_layers - 1}.fc2.weight" not in weights:
        raise InputError(f"teacher {path}: has fewer layers than the {config.encoder_layers} of its cfg; {_EXPECTED}")
    with torch.device("meta"):
        model = Beats(config)
    state = _fit(_own_state(weights, path), model.state_dict(), path)
    model.load_state_dict(state, assign=True)
    return BeatsTeacher(model, config, _classes(checkpoint, config, path))


def read_config(cfg: Mapping[str, Any], path: Path) -> BeatsConfig:
    """What ``cfg`` says of the network. Settings of the training are passed over.

    Raises:
        InputError: an unknown setting that is on, a value of the wrong kind, or values that exclude each other.
    """
    known = {field.name: field for field in fields(BeatsConfig)}
    for name, value in cfg.items():
        off = isinstance(value, (bool, int, float, str, list, tuple, dict, type(None))) and not value
        if name not in known and name not in _TRAINING_ONLY and not off:
            raise InputError(
                f"teacher {path}: cfg has {name} = {_short(value)}, which BEATs as published does not know"
            )
    values = {name: cfg[name] for name in known if name in cfg}
    for name, field in known.items():
        if field.default is MISSING and name not in values:
            raise InputError(f"teacher {path}: cfg lacks {name}; {_EXPECTED}")
        kind = {"int": int, "bool": bool, "str": str}[field.type]
        value = values.get(name, field.default)
        if type(value) is not kind or (kind is int and not 1 <= value <= _MOST):
            wanted = {"int": f"a number from 1 to {_MOST}", "bool": "True or False", "str": "a name"}[field.type]
            raise InputError(f"teacher {path}: cfg has {name} = {_short(value)}, expected {wanted}")
    config = BeatsConfig(**values)
    wrong = _contradiction(config)
    if wrong:
        raise InputError(f"teacher {path}: cfg has {wrong}")
    return config


def _short(value: Any) -> str:
    """``repr``, of which a tensor's has several lines."""
    return repr(value).splitlines()[0][:60]


def _contradiction(config: BeatsConfig) -> str:
    """What of ``config`` cannot be built, or nothing."""
    width, heads, groups = config.encoder_embed_dim, config.encoder_attention_heads, config.conv_pos_groups
    near = config.num_buckets // 4
    if config.activation_fn not in ACTIVATIONS:
        return f"activation_fn = {config.activation_fn!r}, expected one of {', '.join(ACTIVATIONS)}"
    if config.deep_norm and config.layer_norm_first:
        return "both deep_norm and layer_norm_first, which exclude each other"
    if width % heads or width % groups:
        return f"encoder_embed_dim = {width}, not a multiple of its {heads} heads and {groups} conv_pos_groups"
    if config.input_patch_size > NUM_MEL_BINS:
        return f"input_patch_size = {config.input_patch_size}, more than the {NUM_MEL_BINS} mel bins"
    if config.relative_position_embedding and not 0 < near < config.max_distance:
        return f"num_buckets = {config.num_buckets} and max_distance = {config.max_distance}, which do not fit"
    return ""


def _own_state(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The checkpoint's weights under our model's names, float32: weight norm folded, the shared position bias once."""
    # Copies: what the file gave may still lie in the file.
    state = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
    for size, direction in _WEIGHT_NORM:
        if {_CONVOLUTION + size, _CONVOLUTION + direction} <= state.keys():
            gain, filters = state.pop(_CONVOLUTION + size), state.pop(_CONVOLUTION + direction)
            if filters.dim() != 3 or gain.shape != (1, 1, filters.shape[2]):
                raise InputError(
                    f"teacher {path}: {_CONVOLUTION}{size} is {tuple(gain.shape)}, expected one number for each place "
                    f"of the kernel {tuple(filters.shape)}"
                )
            state[_CONVOLUTION + "weight"] = filters * (gain / filters.norm(dim=(0, 1), keepdim=True))
    first = f"encoder.layers.0.{_SHARED_BIAS}"
    for name in [name for name in state if name.endswith(_SHARED_BIAS) and name != first]:
        if first not in state or not torch.equal(state[name], state[first]):
            raise InputError(f"teacher {path}: {name} is not layer 0's, which all layers of BEATs share; {_EXPECTED}")
        del state[name]
    return state


def _fit(state: dict[str, Tensor], own: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``state``, if it has every weight of the model in its shape and no other."""
    for name in own:
        if name not in state:
            raise InputError(f"teacher {path}: lacks {name}, which its cfg asks for; {_EXPECTED}")
    for name, value in state.items():
        if name not in own:
            raise InputError(f"teacher {path}: has {name}, which its cfg does not speak of; {_EXPECTED}")
        if value.shape != own[name].shape:
            found, wanted = tuple(value.shape), tuple(own[name].shape)
            raise InputError(f"teacher {path}: {name} is {found}, its cfg asks for {wanted}; {_EXPECTED}")
    return state


def _classes(checkpoint: Mapping[str, Any], config: BeatsConfig, path: Path) -> tuple[str, ...]:
    """Names in the order of the scores, such as ``/m/09x0r``; none without a head, or without names in the file."""
    names = checkpoint.get("label_dict")
    if not config.finetuned_model or names is None:
        return ()
    number = config.predictor_class
    by_place = {str(place): name for place, name in names.items()} if isinstance(names, Mapping) else {}
    wanted = [by_place.get(str(place)) for place in range(number)]
    if len(by_place) != number or not all(isinstance(name, str) for name in wanted) or len(set(wanted)) != number:
        raise InputError(f"teacher {path}: label_dict does not name each of the {number} classes once; {_EXPECTED}")
    return tuple(wanted)
