"""Figures 5 and 7 of the paper, from any clips.

    python benchmarks/paper_figures.py esc10.manifest --figure 5 --seconds 5
    python benchmarks/paper_figures.py esc10.manifest --figure 7 --classes dog rain helicopter rooster

Figure 5 takes a random hundred clips and looks at the mean gradient magnitude of each patch, the x of Formula 1: where
in time and frequency it is high and where it varies, and how it lies around the mean of its clip, which is what the
Gaussian of Formula 1 weighs. Figure 7 shows a clip of each of some classes: waveform, log-mel spectrogram, and its HOG
as scikit-image draws it. Files: ``OUT/figure5.png``, ``figure5.json``, ``figure7.png``.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from skimage.feature import hog

import fastsskd_kernels as kernels
from fastsskd.batch import Batch
from fastsskd.errors import InputError, UsageError
from fastsskd.loader import Loader, open_manifest
from fastsskd.manifest import Manifest
from fastsskd.patches import NUM_MEL_BINS, PATCH, num_input_frames

RESULTS = Path(__file__).parent / "results"
GRID_F = NUM_MEL_BINS // PATCH


def load(clips: Manifest, seconds: float) -> list[Batch]:
    """The clips from their beginnings, with their waveforms; those that cannot be used are left out."""
    loader = Loader(clips, batch_size=16, seconds=seconds, train=False, waveform=True)
    batches = [batch for batch in loader if len(batch)]
    loader.close()
    if not batches:
        raise InputError(f"none of the {len(clips)} clips could be used: {next(iter(loader.skipped.values()), '')}")
    return batches


def draw_figure5(clips: Manifest, args: argparse.Namespace) -> dict:
    """Mean and deviation of x over the clips for each patch, and the distribution of x around its clip's mean."""
    chosen = np.random.default_rng(args.seed).permutation(len(clips))[: args.clips]
    x = torch.cat([batch.hog for batch in load(clips.select(np.sort(chosen)), args.seconds)])
    # Patches of padding alone say nothing of the clip.
    real = kernels.num_frames(round(args.seconds * 16000)) // PATCH
    grid = x.view(len(x), num_input_frames(args.seconds) // PATCH, GRID_F)[:, :real]
    own = grid.flatten(1)
    sigma, mu = torch.std_mean(own, dim=1, unbiased=False, keepdim=True)
    distance = ((own - mu) / sigma.clamp(min=1e-9)).flatten()
    figure, axes = plt.subplots(1, 3, figsize=(17, 4.4), layout="constrained")
    for axis, values, title in (
        (axes[0], grid.mean(dim=0), "mean of x over the clips"),
        (axes[1], grid.std(dim=0), "standard deviation of x over the clips"),
    ):
        image = axis.imshow(values.T.numpy(), origin="lower", aspect="auto", cmap="magma")
        axis.set(title=title, xlabel="patch in time", ylabel="patch in frequency")
        figure.colorbar(image, ax=axis, pad=0.01)
    axes[2].hist(distance.numpy(), bins=80, range=(-4, 4), density=True, color="0.7", label="patches")
    place = np.linspace(-4, 4, 200)
    axes[2].plot(place, np.exp(-(place**2)), color="C3", label="weight, Formula 1")
    axes[2].set(title="distance of x from its clip's mean", xlabel="(x - mu) / sigma", ylabel="density; weight")
    axes[2].legend()
    figure.suptitle(f"Figure 5: mean gradient magnitude x of each patch, {len(x)} clips")
    save(figure, args.out / "figure5.png")
    found = {
        "clips": len(x),
        "mean_of_frequency_patch": grid.mean(dim=(0, 1)).tolist(),
        "std_of_frequency_patch": grid.std(dim=(0, 1)).tolist(),
        "share_within_one_sigma": float((distance.abs() < 1).float().mean()),
        "mean_weight": float(torch.exp(-distance.square()).mean()),
    }
    (args.out / "figure5.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def draw_figure7(clips: Manifest, args: argparse.Namespace) -> None:
    """A column for each class: waveform, spectrogram, HOG."""
    rows = [first_of(clips, name) for name in args.classes or clips.classes[:4]]
    batches = load(clips.select(np.sort(rows)), args.seconds)
    by_row = {int(clip): (batch, i) for batch in batches for i, clip in enumerate(batch.index)}
    places = {row: place for place, row in enumerate(np.sort(rows).tolist())}
    figure, axes = plt.subplots(3, len(rows), figsize=(4.6 * len(rows), 8), squeeze=False, layout="constrained")
    for column, (row, name) in enumerate(zip(rows, args.classes or clips.classes[:4], strict=True)):
        if places[row] not in by_row:
            raise InputError(f"{clips.key(row)}: could not be used; `fastsskd check` says why")
        batch, i = by_row[places[row]]
        waveform = batch.waveform[i]
        fbank = kernels.fbank(waveform[None])
        axes[0, column].plot(np.arange(len(waveform)) / 16000, waveform.numpy(), lw=0.4, color="black")
        axes[0, column].set(title=name, xlabel="time (s)", ylabel="amplitude", xlim=(0, args.seconds))
        axes[1, column].imshow(fbank[0].T.numpy(), origin="lower", aspect="auto", cmap="magma")
        axes[1, column].set(xlabel="frame (10 ms)", ylabel="mel bin")
        axes[2, column].imshow(hog_picture(fbank), origin="lower", aspect="auto", cmap="gray")
        axes[2, column].set(xlabel="frame (10 ms)", ylabel="mel bin")
    figure.suptitle("Figure 7: waveform, log-mel spectrogram, HOG (cells of 16 x 16)")
    save(figure, args.out / "figure7.png")


def first_of(clips: Manifest, name: str) -> int:
    """Row of the first clip of a class."""
    if name not in clips.classes:
        raise UsageError(f"--classes {name}: the manifest has {', '.join(clips.classes[:20])}")
    label, wanted = clips.label_of(np.arange(len(clips))), clips.classes.index(name)
    found = np.flatnonzero(label == wanted if label.ndim == 1 else label[:, wanted] > 0)
    if not len(found):
        raise InputError(f"class {name}: the manifest has no clip of it")
    return int(found[0])


def hog_picture(fbank: torch.Tensor) -> np.ndarray:
    """scikit-image's picture of the HOG, ``(F, T)``: lines along the edges, as bright as their bins."""
    cells = {"orientations": 9, "pixels_per_cell": (PATCH, PATCH), "cells_per_block": (1, 1)}
    _, picture = hog(fbank[0].numpy(), **cells, visualize=True)
    return np.clip(picture.T / max(np.percentile(picture, 99.5), 1e-9), 0.0, 1.0)


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="manifest or folder")
    parser.add_argument("--figure", type=int, nargs="+", required=True, choices=(5, 7))
    parser.add_argument("--clips", type=int, default=100, help="of Figure 5 (default %(default)s, as the paper)")
    parser.add_argument("--classes", nargs="+", default=(), help="of Figure 7; default: the first four")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each clip")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of clips")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    try:
        clips = open_manifest(args.manifest)
        args.out.mkdir(parents=True, exist_ok=True)
        if 5 in args.figure:
            print(json.dumps(draw_figure5(clips, args), indent=1))
        if 7 in args.figure:
            draw_figure7(clips, args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
