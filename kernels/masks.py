"""Which patches, and which parts of patches, a view hides (Formula 1, Figures 3 and 4). True = masked, throughout.

All noise comes from ``random``: the mask of a clip depends on the clip's seed, not on its batch, rank or device.
"""

import numpy as np
import torch

from fastsskd_kernels.backend import resolve_backend
from fastsskd_kernels.masks_cpu import FIELD_BITS, intra_batch
from fastsskd_kernels.random import (
    STREAM_INTER,
    STREAM_INTRA_BANDS,
    STREAM_INTRA_ORDER,
    STREAM_INTRA_SHARE,
    clip_seeds,
    random_bits,
    uniform,
    uniform64,
)

MAX_EXPONENT = 80.0  # exp(-80) = 1.8e-35 is still a normal float32: no weight underflows to zero
FIELD = 1 << FIELD_BITS  # a random word of 64 bits is cut into three fields
FLAT = 1e-6  # a spread below this fraction of the mean is rounding, not signal


def patch_weight(x: torch.Tensor, *, form: str = "gaussian") -> torch.Tensor:
    """Sampling weight of each patch from its mean gradient: Formula 1.

    ``w = exp(-(x - mu)^2 / sigma^2)`` with mu and sigma^2 the mean and population variance over the clip's patches. The
    paper prints ``1 / e^{-(x - mu)^2 / sigma^2}``, which grows away from the mean, against its own sentence and
    Formula 2. That form has no upper bound, so ``"printed"`` divides it by its largest value in the clip: ratios, all
    that sampling sees, stay those of the paper, and weights stay in (0, 1].

    Args:
        x: (B, N) floating point, for instance of ``hog_patch_mean``.
        form: ``"gaussian"`` or ``"printed"``.

    Returns:
        (B, N) float32 in (0, 1], at least exp(-80). A clip without spread (silence) gets ones. A clip with a NaN or
        infinite x gets NaN throughout.

    Raises:
        ValueError: wrong shape, dtype or form.
    """
    if x.ndim != 2 or not x.is_floating_point() or x.shape[1] < 1:
        raise ValueError(f"x: expected floating point (B, N) with N >= 1, got {x.dtype} {tuple(x.shape)}")
    if form not in ("gaussian", "printed"):
        raise ValueError(f"form={form!r}: expected 'gaussian' or 'printed'")
    x = x.float()
    mean = x.mean(1, keepdim=True)
    squared = (x - mean).square()
    variance = squared.mean(1, keepdim=True)
    flat = variance <= (FLAT * mean).square()
    exponent = torch.where(flat, 0.0, squared / variance)
    if form == "printed":
        exponent = exponent.amax(1, keepdim=True) - exponent
    return torch.exp(-exponent.clamp(max=MAX_EXPONENT))


def inter_patch_mask(
    weight: torch.Tensor, mask_ratio: float, *, generator: torch.Generator | torch.Tensor
) -> torch.Tensor:
    """Hide whole patches, drawn without replacement with probability proportional to their weight (Figure 4).

    Each patch waits an exponential time of rate ``weight`` and the first ones are taken: that is drawing one patch
    after the other by weight (Efraimidis and Spirakis 2006), and the same ranking as Gumbel top-k on log w.

    Args:
        weight: (B, N) float32, > 0; ones draw uniformly. A clip whose weights are NaN is still masked, its patches
            chosen without meaning.
        mask_ratio: share of patches to hide, in [0, 1].
        generator: a ``torch.Generator``, or (B,) int64 seeds, one per clip.

    Returns:
        (B, N) bool, exactly ``round(mask_ratio * N)`` True per clip.

    Raises:
        ValueError: wrong shape, dtype, ratio or generator.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected floating point (B, N), got {weight.dtype} {tuple(weight.shape)}")
    if not 0.0 <= mask_ratio <= 1.0:
        raise ValueError(f"mask_ratio={mask_ratio}: expected 0 to 1")
    batch, patches = weight.shape
    seeds = clip_seeds(generator, batch, weight.device)
    # float64: equal waiting times, which devices could order differently, are then practically impossible.
    waiting = -torch.log1p(-uniform64(seeds, patches, stream=STREAM_INTER)) / weight.double()
    first = waiting.topk(round(mask_ratio * patches), dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, first, True)


def intra_patch_mask(
    batch: int,
    grid_size: tuple[int, int],
    *,
    patch: int = 16,
    generator: torch.Generator | torch.Tensor,
    max_share: float = 0.5,
    p_time: float = 0.3,
    p_freq: float = 0.3,
    p_both: float = 0.4,
    max_width: float = 0.25,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Hide a time band, a frequency band or both inside some patches (Figure 3, Section 4.2).

    A clip touches k patches, k uniform on 0 ... max_share * N, chosen without replacement. In each, a band has a width
    uniform on 1 ... max_width * patch pixels and a start uniform on the places where it fits.

    Args:
        batch: B.
        grid_size: patches along time and along frequency, such as (64, 8).
        patch: side of a patch in pixels.
        generator: a ``torch.Generator``, or (B,) int64 seeds, one per clip.
        max_share: largest share of touched patches, in [0, 1].
        p_time, p_freq, p_both: probabilities of the three kinds; they sum to 1.
        max_width: largest band width as a share of the patch, in (0, 1]; at least one pixel.
        device: of the result; by default the generator's.
        backend: ``"auto"``, ``"torch"`` or ``"numba"``, which give the same mask; see ``resolve_backend``.

    Returns:
        (B, T, F) bool, T = grid_size[0] * patch, F = grid_size[1] * patch.

    Raises:
        ValueError: sizes, shares or probabilities out of range, or a wrong generator.
    """
    if min(batch, *grid_size, patch) < 1:
        raise ValueError(f"batch={batch}, grid_size={grid_size}, patch={patch}: expected at least 1 each")
    if not (0.0 <= max_share <= 1.0 and 0.0 < max_width <= 1.0):
        raise ValueError(f"max_share={max_share}, max_width={max_width}: expected [0, 1] and (0, 1]")
    if min(p_time, p_freq, p_both) < 0.0 or abs(p_time + p_freq + p_both - 1.0) > 1e-6:
        raise ValueError(f"p_time + p_freq + p_both: expected 1 without negatives, got {p_time}, {p_freq}, {p_both}")
    seeds = clip_seeds(generator, batch, device)
    patches, widest = grid_size[0] * grid_size[1], max(1, int(max_width * patch))
    if resolve_backend(backend, seeds) == "numba":
        image = torch.zeros(batch, grid_size[0] * patch, grid_size[1] * patch, dtype=torch.uint8)
        bounds = np.float32(p_time * FIELD), np.float32((p_time + p_freq) * FIELD)  # torch compares in float32 too
        unsigned = seeds.contiguous().numpy().view(np.uint64)
        intra_batch(unsigned, grid_size[1], patch, widest, int(max_share * patches), *bounds, image.numpy())
        return image.view(torch.bool)
    touched = _touched_patches(seeds, patches, max_share)
    words = random_bits(seeds, 2 * patches, stream=STREAM_INTRA_BANDS)
    kind = _field(words[:, :patches], 2)
    has_time = touched & ((kind < p_time * FIELD) | (kind >= (p_time + p_freq) * FIELD))
    has_freq = touched & (kind >= p_time * FIELD)
    time = _bands(words[:, :patches], patch, widest, has_time)
    freq = _bands(words[:, patches:], patch, widest, has_freq)
    return _paint(time, freq, grid_size)


def _touched_patches(seeds: torch.Tensor, patches: int, max_share: float) -> torch.Tensor:
    """(B,) seeds -> (B, N) bool: k patches of each clip, k uniform on 0 ... max_share * N."""
    most = int(max_share * patches)
    count = (uniform(seeds, 1, stream=STREAM_INTRA_SHARE) * (most + 1)).long()
    order = uniform64(seeds, patches, stream=STREAM_INTRA_ORDER)
    first = order.topk(most, dim=1, largest=False, sorted=True).indices
    taken = torch.arange(most, device=seeds.device) < count
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, first, taken)


def _field(words: torch.Tensor, place: int) -> torch.Tensor:
    """One of the three fields of each random word, as int64 in [0, FIELD)."""
    return (words >> (place * FIELD_BITS)) & (FIELD - 1)


def _bands(words: torch.Tensor, patch: int, widest: int, wanted: torch.Tensor) -> torch.Tensor:
    """Random words (B, N) -> (B, N, patch) bool: one run of 1 ... widest pixels, anywhere it fits, where wanted."""
    width = 1 + ((_field(words, 0) * widest) >> FIELD_BITS)
    start = (_field(words, 1) * (patch - width + 1)) >> FIELD_BITS
    stop = start + width * wanted
    small = torch.uint8 if patch < 256 else torch.int32  # the only large comparisons
    pixel = torch.arange(patch, device=words.device).to(small)
    return (pixel >= start.to(small).unsqueeze(-1)) & (pixel < stop.to(small).unsqueeze(-1))


def _paint(time: torch.Tensor, freq: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Bands along each axis of each patch, (B, N, patch) bool -> the union as an image (B, T, F).

    Eight pixels of a row are one int64 word here (where the patch allows): the image is large and the bands are few.
    """
    batch, _, patch = time.shape
    rows, columns = grid_size
    word, full = (torch.int64, 0x0101010101010101) if patch % 8 == 0 else (torch.uint8, 1)
    time = time.view(batch, rows, columns, patch).transpose(2, 3).to(word) * full
    freq = freq.view(word).view(batch, rows, 1, columns, -1)
    image = time.new_empty(batch, rows, patch, columns, freq.shape[-1])
    for i in range(freq.shape[-1]):
        torch.bitwise_or(time, freq[..., i], out=image[..., i])
    return image.view(torch.bool).view(batch, rows * patch, columns * patch)
