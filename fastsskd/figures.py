"""Pictures of a run: loss curves, and what the views and the reconstruction of one clip look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from fastsskd import health
from fastsskd.batch import Batch
from fastsskd.config import MaskConfig
from fastsskd.loader import Loader
from fastsskd.manifest import Manifest
from fastsskd.model import ACM
from fastsskd.patches import PATCH, unpatchify
from fastsskd.run_folder import LINE_FIELDS
from fastsskd.views import make_views
from fastsskd.weights import ModelInfo

_NOT_TERMS = LINE_FIELDS | {"loss", *health.NAMES}


def loss_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """One panel a stage: the total loss and its terms over epochs, each term on the same logarithmic axis."""
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    columns = min(len(stages), 3)
    rows = -(-len(stages) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 4.0 * rows), squeeze=False, layout="constrained")
    for axis, stage in zip(axes.flat, stages, strict=False):
        own = [line for line in lines if line["stage"] == stage]
        epochs = [line["epoch"] for line in own]
        axis.plot(epochs, [line["loss"] for line in own], color="black", lw=2, label="total")
        for name in own[0]:
            if name not in _NOT_TERMS:
                style = "--" if name.endswith("_inter") else "-"
                axis.plot(epochs, [line[name] for line in own], style, lw=1, label=name)
        axis.set(title=stage, xlabel="epoch", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    for axis in list(axes.flat)[len(stages) :]:
        axis.set_axis_off()
    figure.suptitle("Losses")
    _save(figure, path)


def draw_views(model: ACM, info: ModelInfo, clips: Manifest, mask: MaskConfig, path: Path) -> None:
    """Draw what a model makes of one of eight clips that are spread over ``clips``: the same one at every call."""
    spread = np.unique(np.linspace(0, len(clips) - 1, 8).astype(np.int64))
    loader = Loader(clips.select(spread), batch_size=8, seconds=info.seconds, mean=info.mean, std=info.std)
    for batch in loader:
        if len(batch):
            views_figure(model, batch, mask, path)
    loader.close()


@torch.no_grad()
def views_figure(model: ACM, batch: Batch, mask: MaskConfig, path: Path) -> None:
    """The liveliest clip of a batch: spectrogram, HOG weights, intra and inter views, and both reconstructions."""
    row = int(batch.hog.std(dim=1).argmax())
    views = make_views(batch, mask)
    grid = model.grid_size
    intra = model.decode(model.features(views.intra))
    inter = model.decode(model.features_inter(views.raw, views.ids_keep))
    hidden = views.raw.masked_fill(views.inter_mask.unsqueeze(-1), 0.0)
    per_patch = views.weight.unsqueeze(-1).expand(-1, -1, PATCH * PATCH)
    pictures = [
        ("log-mel spectrogram (normalised)", views.raw),
        ("HOG weight of each patch (Formula 1)", per_patch),
        ("intra-patch view: bands inside patches masked", views.intra),
        ("reconstructed from the intra view", intra),
        (f"inter-patch view: {100 * mask.inter_ratio:.0f} % of the patches masked", hidden),
        ("reconstructed from the inter view", inter),
    ]
    figure, axes = plt.subplots(3, 2, figsize=(13, 8), layout="constrained")
    spectrogram = views.raw[row].numpy()
    low, high = np.percentile(spectrogram, [1, 99.5])
    for axis, (title, patches) in zip(axes.flat, pictures, strict=True):
        picture = unpatchify(patches[row : row + 1].float(), grid)[0].T.numpy()
        limits = (0.0, 1.0) if "weight" in title else (low, high)
        image = axis.imshow(picture, origin="lower", aspect="auto", vmin=limits[0], vmax=limits[1], cmap="magma")
        axis.set(title=title, xlabel="frame (10 ms)", ylabel="mel bin")
        figure.colorbar(image, ax=axis, pad=0.01)
    figure.suptitle(f"Views of {batch.key[row]}")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
