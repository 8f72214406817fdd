"""Which patches, and which parts of patches, a view hides (Formula 1, Figures 3 and 4). True = masked, throughout.

All noise comes from ``random``: the mask of a clip depends on the clip's seed, not on its batch, rank or device.
"""

import torch

from fastsskd_kernels.random import (
    STREAM_INTER,
    STREAM_INTRA_BANDS,
    STREAM_INTRA_ORDER,
    STREAM_INTRA_SHARE,
    clip_seeds,
    uniform,
    uniform64,
)

MAX_EXPONENT = 80.0  # exp(-80) = 1.8e-35 is still a normal float32: no weight underflows to zero
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
    seeds = clip_seeds(generator, batch, torch.device(device) if device is not None else generator.device)
    touched = _touched_patches(seeds, grid_size[0] * grid_size[1], max_share)
    noise = uniform(seeds, 5 * touched.shape[1], stream=STREAM_INTRA_BANDS).view(batch, 5, -1)
    kind, widest = noise[:, 0], max(1, int(max_width * patch))
    has_time = touched & ((kind < p_time) | (kind >= p_time + p_freq))
    has_freq = touched & (kind >= p_time)
    time = _bands(noise[:, 1], noise[:, 2], patch, widest) & has_time.unsqueeze(-1)
    freq = _bands(noise[:, 3], noise[:, 4], patch, widest) & has_freq.unsqueeze(-1)
    return _paint(time, freq, grid_size)


def _touched_patches(seeds: torch.Tensor, patches: int, max_share: float) -> torch.Tensor:
    """(B,) seeds -> (B, N) bool: k patches of each clip, k uniform on 0 ... max_share * N."""
    share = uniform(seeds, 1, stream=STREAM_INTRA_SHARE)
    count = (share * (int(max_share * patches) + 1)).long()
    order = uniform64(seeds, patches, stream=STREAM_INTRA_ORDER)
    # The k smallest of N numbers are those below the k-th of them, counted from 0.
    limit = torch.nn.functional.pad(order.sort(dim=1).values, (0, 1), value=2.0).gather(1, count)
    return order < limit


def _bands(width_noise: torch.Tensor, start_noise: torch.Tensor, patch: int, widest: int) -> torch.Tensor:
    """Two (B, N) uniforms -> (B, N, patch) bool: one run of 1 ... widest pixels, anywhere it fits."""
    width = (width_noise * widest).long() + 1
    start = (start_noise * (patch - width + 1)).long()
    pixel = torch.arange(patch, device=width.device)
    start, width = start.unsqueeze(-1), width.unsqueeze(-1)
    return (pixel >= start) & (pixel < start + width)


def _paint(time: torch.Tensor, freq: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Bands along each axis of each patch, (B, N, patch) bool -> the union as an image (B, T, F)."""
    batch, _, patch = time.shape
    rows, columns = grid_size
    time = time.view(batch, rows, columns, patch).transpose(2, 3).unsqueeze(-1)
    freq = freq.view(batch, rows, 1, columns, patch)
    return (time | freq).reshape(batch, rows * patch, columns * patch)
