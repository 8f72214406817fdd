"""The TOML configuration: frozen dataclasses, strict loading, ``--set a.b=c`` overrides, and the resolved dump.

Batch sizes, precision, ZeRO, clipping and logging back-ends belong to the DeepSpeed JSON (``fastsskd/ds_config.py``);
everything else is here. Unknown keys and values out of range are a :class:`~fastsskd.errors.UsageError`.
Each field's comment is its documentation and is what ``launch/train.py --help`` prints.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from fastsskd.config_rules import contradictions
from fastsskd.errors import InputError, UsageError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974
SIZES = ("base", "small", "tiny", "micro", "mini", "nano")  # the presets of fastsskd/model.py


def _option(default: Any, doc: str, **limits: Any) -> Any:
    """A dataclass field with its documentation and its limits (``low``, ``high``, ``choices``)."""
    metadata = {"doc": doc, **limits}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    out: str = _option("runs/default", "folder of the run; must be new unless --resume")
    seed: int = _option(0, "seed of the order, crops, masks, initialisation and augmentation", low=0, high=2**63 - 1)
    log_every: int = _option(10, "optimizer steps between two lines in metrics.jsonl", low=1)
    checkpoint_every: int = _option(0, "optimizer steps between two checkpoints; 0 = only at the end of a stage", low=0)
    keep_checkpoints: int = _option(2, "checkpoints kept for --resume", low=2)
    pictures_every: int = _option(
        5, "epochs of Multi-SSL between two pictures of what it reconstructs; 0 = only after the last", low=0
    )
    timeout: int = _option(600, "seconds a rank waits for the others before it ends the run", low=5)


@dataclass(frozen=True)
class DataConfig:
    manifest: str = _option("", "manifest written by `fastsskd index`, or a folder or file that it can index")
    eval_manifest: str = _option("", "a second manifest to evaluate on; empty = split `manifest`")
    ssl_manifest: str = _option("", "clips for the Multi-SSL stages, labels or not; empty = the training clips")
    train_folds: tuple[int, ...] = _option([], "folds to train on; empty = all but eval_folds")
    eval_folds: tuple[int, ...] = _option(
        [], "folds to evaluate on; empty = the manifest's own split, or its last fold"
    )
    eval_share: float = _option(0.2, "share of each class held out when there are no folds", low=0.01, high=0.9)
    max_train: int = _option(0, "labelled stages use a random draw of this many training clips; 0 = all", low=0)
    max_eval: int = _option(0, "evaluate on a random draw of this many clips; 0 = all", low=0)
    seconds: float = _option(10.0, "length of a crop; shorter clips are looped", low=0.16, high=60.0)
    mean: float = _option(AUDIOSET_MEAN, "mean of the log-mel features; `fastsskd stats` computes a set's own")
    std: float = _option(AUDIOSET_STD, "standard deviation; features become (x - mean) / (2 * std)", low=1e-6)
    workers: int = _option(0, "decoding and feature threads per rank; 0 = cores / ranks on this machine", low=0)
    prefetch: int = _option(0, "batches made ready ahead of training; 0 = chosen by their size", low=0, high=64)
    sampling: str = _option(
        "uniform",
        "each clip once an epoch, in random order; balanced = in labelled stages as many draws with replacement, by "
        "AudioSet's class-balanced weights; weights = in all stages, by the manifest's own",
        choices=("uniform", "balanced", "weights"),
    )
    max_bad_share: float = _option(0.2, "stop when more than this share of the clips seen is bad", low=0.0, high=1.0)
    max_bad: int = _option(-1, "stop when more than this many clips are bad; -1 = the share alone decides", low=-1)


@dataclass(frozen=True)
class MaskConfig:
    intra_max_share: float = _option(0.5, "intra view: at most this share of the patches is touched", low=0.0, high=1.0)
    intra_p_time: float = _option(0.3, "probability that a touched patch gets a time band only", low=0.0, high=1.0)
    intra_p_freq: float = _option(0.3, "... a frequency band only; the rest gets both", low=0.0, high=1.0)
    intra_max_width: float = _option(0.25, "widest band, as a share of the patch side", low=0.0625, high=1.0)
    inter_ratio: float = _option(
        0.75, "inter view: share of the patches masked (Table 3: 0.45 to 0.85)", low=0.01, high=0.99
    )
    inter_sampling: str = _option("hog", "hog = Formula 1's weights, uniform = plain MAE", choices=("hog", "uniform"))
    clones: int = _option(
        1,
        "masked views of each kind for each clip, which share its raw view's pass (data2vec 2.0, EAT)",
        low=1,
        high=64,
    )
    hog_form: str = _option(
        "gaussian", "gaussian = exp(-(x-mu)^2/sigma^2); printed = Formula 1 as printed", choices=("gaussian", "printed")
    )


@dataclass(frozen=True)
class ModelConfig:
    size: str = _option("base", "preset; base has 92 M parameters", choices=SIZES)
    attention: str = _option(
        "plain", "simam = SimAM's parameter-free attention after each block's own (SPFA)", choices=("plain", "simam")
    )
    pooling: str = _option(
        "mean",
        "of the tokens for the class head: their mean, or attentive = attention by one learned query",
        choices=("mean", "attentive"),
    )
    init: str = _option(
        "",
        "start iteration 1 from a file: a model of ours, a ViT of timm's, DeiT's or Google's, AudioMAE; empty = random",
    )
    drop_path: float = _option(
        0.0, "stochastic depth rate of the last block while training with labels", low=0.0, high=0.9
    )
    activation_checkpointing: bool = _option(False, "recompute the blocks in the backward pass: less memory, more time")


@dataclass(frozen=True)
class LossConfig:
    alpha: float = _option(1.0, "weight of restore + feature MSE (Formula 10)", low=0.0)
    beta: float = _option(1.0, "weight of the feature KL (Formula 10)", low=0.0)
    tau: float = _option(0.1, "temperature of the contrast (Formula 8)", low=1e-3)
    restore_intra: bool = _option(True, "Formula 2, intra view")
    restore_inter: bool = _option(True, "Formula 2, inter view")
    mse_intra: bool = _option(True, "Formula 4, intra view")
    mse_inter: bool = _option(True, "Formula 4, inter view")
    kl_intra: bool = _option(True, "Formula 5, intra view")
    kl_inter: bool = _option(True, "Formula 5, inter view")
    contrast_intra: bool = _option(True, "Formula 8, intra view")
    contrast_inter: bool = _option(True, "Formula 8, inter view")
    restore_scale: float = _option(
        1.0,
        "further weight of the reconstruction inside alpha's bracket; 1 = Formula 10 as printed, where the other terms "
        "drown it; 8 in the recipes (docs/method.md)",
        low=0.0,
    )
    hog_weight: bool = _option(True, "weight the reconstruction by HOG (Tables 1 and 4)")
    restore_target: str = _option(
        "spectrogram",
        "spectrogram = the true one; res_raw = the raw view's own reconstruction (pseudo code)",
        choices=("spectrogram", "res_raw"),
    )
    restore_on: str = _option("all", "reconstruction over all pixels or the masked ones", choices=("all", "masked"))
    raw_gradient: bool = _option(False, "let gradients flow through the raw view, the fitting target")

    @property
    def contrasts(self) -> bool:
        """Whether Formula 8 or 9 is on, so that clips are told apart from those of the global batch."""
        return self.contrast_intra or self.contrast_inter


@dataclass(frozen=True)
class StageConfig:
    epochs: int = _option(10, "epochs of the stage", low=1)
    lr: float = _option(1.5e-4, "peak learning rate in iteration 1", low=0.0)
    layer_decay: float = _option(1.0, "the lr of each earlier block is multiplied by this", low=0.1, high=1.0)
    warmup_epochs: float = _option(1.0, "epochs of linear warm-up", low=0.0)


@dataclass(frozen=True)
class DistillConfig(StageConfig):
    teacher: str | tuple[str, ...] = _option(
        "",
        "checkpoint of the teacher: ours, AST's, BEATs', AudioMAE's; or a list of them, whose mean teaches; empty = "
        "none; `previous` = the last iteration's model; `supervised` = one of the same size trained with labels first",
    )
    stored: str = _option(
        "", "folder that `fastsskd teach` has filled with a teacher's answers, instead of `teacher`; empty = none"
    )
    teacher_ahead: bool = _option(
        False, "with gradient accumulation: ask the teacher once a step, for all of its micro-batches together"
    )
    teacher_classes: str = _option(
        "", "class_labels_indices.csv that names a teacher's outputs where its checkpoint does not, or by /m/... only"
    )
    labels: bool = _option(True, "cross entropy with the labels (the paper's text)")
    teacher_labels: bool = _option(True, "cross entropy with the teacher's class output (Formula 11)")
    class_map: str = _option("", "JSON file {class of the data set: class of the teacher}; empty = by the same names")
    gamma: float = _option(1.0, "weight of the feature regression (Formulas 12 and 13)", low=0.0)
    label_smoothing: float = _option(0.0, "label smoothing of the label term", low=0.0, high=0.9)
    select: str = _option(
        "last",
        "weights kept: of the last epoch; of the best on the evaluation set (optimistic: say so); or the average",
        choices=("last", "best", "average"),
    )
    average_epochs: int = _option(5, "select = average: mean of the weights after each of this many last epochs", low=1)
    ema: float = _option(
        0.0,
        "decay of a moving average of the weights, such as 0.999; it is what is evaluated and saved; 0 = none",
        low=0.0,
        high=0.999999,
    )
    frozen: bool = _option(False, "train the class head, and attentive pooling, on the features as they are")


@dataclass(frozen=True)
class AugmentConfig:
    mixup: float = _option(
        0.0, "share of the training batches' clips that are mixed with another one", low=0.0, high=1.0
    )
    mixup_alpha: int = _option(10, "the mixing ratio is drawn from Beta(alpha, alpha)", low=1, high=100)
    time_roll: bool = _option(False, "rotate each spectrogram by a random number of frames")
    noise: float = _option(0.0, "largest standard deviation of noise added to the normalised spectrogram", low=0.0)
    time_mask: int = _option(0, "SpecAugment: widest time band in frames", low=0)
    freq_mask: int = _option(0, "SpecAugment: widest frequency band in mel bins", low=0, high=128)
    ssl: bool = _option(False, "mixup, time_roll and noise in Multi-SSL too: for small sets, which it learns by heart")


@dataclass(frozen=True)
class OptimConfig:
    schedule: str = _option("cosine", "after the warm-up: cosine to zero, or constant", choices=("cosine", "constant"))
    betas: tuple[float, ...] = _option([0.9, 0.95], "AdamW betas")
    weight_decay: float = _option(0.05, "AdamW weight decay; biases, norms, positions and tokens have none", low=0.0)
    max_bad_steps: int = _option(5, "stop after so many steps in a row whose loss or gradients are not finite", low=1)


@dataclass(frozen=True)
class RecipeConfig:
    iterations: int = _option(3, "Multi-SSL then distillation, this many times", low=1, high=100)
    stages: tuple[str, ...] = _option(["ssl", "distill"], "stages of one iteration", choices=("ssl", "distill"))
    lr_decay: float = _option(0.8, "the learning rate's factor after each iteration", low=0.01, high=1.0)


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    ssl: StageConfig = field(default_factory=StageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)

    @property
    def num_samples(self) -> int:
        """Samples of one crop at 16 kHz."""
        return round(self.data.seconds * 16000)


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a TOML file and apply ``section.key=value`` overrides.

    Raises:
        InputError: the file is absent.
        UsageError: not TOML, an unknown section or key, a value of the wrong type or out of range.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror}; presets are in launch/configs/") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config {path}: not valid TOML: {error}") from error
    for text in overrides:
        _apply_override(tree, text)
    return from_dict(tree, source=str(path))


def from_dict(tree: dict[str, Any], source: str = "config") -> Config:
    """Build a :class:`Config` from nested dictionaries, checking every key, type and limit."""
    sections: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    values = {}
    for name, content in tree.items():
        if name not in sections:
            raise UsageError(f"{source}: unknown section [{name}]; there are {', '.join(sections)}")
        if not isinstance(content, dict):
            raise UsageError(f"{source}: {name} must be a section, [{name}]")
        values[name] = _section(sections[name], name, content, source)
    config = Config(**values)
    for problem in contradictions(config):
        raise UsageError(f"{source}: {problem}")
    return config


def _section(cls: type, name: str, content: dict[str, Any], source: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    checked = {}
    for key, value in content.items():
        if key not in fields:
            near = _nearest(key, fields)
            raise UsageError(f"{source}: unknown key {name}.{key}; {near}")
        checked[key] = _checked(f"{source}: {name}.{key}", value, hints[key], fields[key].metadata)
    return cls(**checked)


def _nearest(key: str, known: Any) -> str:
    import difflib

    match = difflib.get_close_matches(key, known, 1)
    return f"did you mean {match[0]}?" if match else f"known keys: {', '.join(known)}"


def _checked(where: str, value: Any, hint: Any, limits: Any) -> Any:
    """``value`` as the type ``hint``, inside its limits."""
    if hint == str | tuple[str, ...]:
        hint = tuple[str, ...] if isinstance(value, (list, tuple)) else str
    if hint in (tuple[int, ...], tuple[float, ...], tuple[str, ...]):
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{where}: expected a list, got {value!r}")
        item = hint.__args__[0]
        return tuple(_checked(where, v, item, limits) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise UsageError(f"{where}: expected {hint.__name__}, got {value!r}")
    if "choices" in limits and value not in limits["choices"]:
        raise UsageError(f"{where}: {value!r} is not one of {', '.join(limits['choices'])}")
    if hint in (int, float):
        low, high = limits.get("low"), limits.get("high")
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            allowed = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
            raise UsageError(f"{where}: {value} is out of range {allowed}")
    return value


def _apply_override(tree: dict[str, Any], text: str) -> None:
    """``a.b=c``: ``c`` is read as a TOML value, or else as a plain string."""
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise UsageError(f"--set {text}: write it as section.key=value")
    try:
        value = tomllib.loads(f"x = {raw}")["x"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    section = tree.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise UsageError(f"--set {text}: {parts[0]} is not a section")
    section[parts[1]] = value


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries of plain values, as :func:`from_dict` takes them."""
    return dataclasses.asdict(config)


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML, every field with its documentation."""
    lines = []
    for part in dataclasses.fields(config):
        lines.append(f"[{part.name}]")
        section = getattr(config, part.name)
        for item in dataclasses.fields(section):
            lines.append(f"{item.name} = {_toml_value(getattr(section, item.name))}  # {item.metadata['doc']}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    # TOML's booleans, numbers and basic strings are JSON's, but for surrogate pairs and a raw DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
