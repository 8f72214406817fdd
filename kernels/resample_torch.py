"""The resampler of ``resample.py`` as a convolution, for a GPU: the same filter, the same crop or loop, whole batches.

``up`` outputs follow from every ``down`` inputs, each with a filter of its own, so resampling is a strided convolution
with ``up`` channels. Only the inputs of the crop go to the device, at the file's own rate.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fastsskd_kernels.crop import INT16_SCALE, crop_start
from fastsskd_kernels.resample import MAX_PHASES, resample_table, resampled_length


@dataclass(frozen=True)
class CropInputs:
    """What of a clip its crop is made from.

    Attributes:
        samples: (L,) float32, or int16 full scale, at the clip's rate, with the filter's reach on either side, zero
            beyond the clip.
        rate: Hz.
        offset: output of ``samples`` at which the crop starts.
        period: outputs after which the clip repeats; the crop's length or more for a clip that is long enough.
    """

    samples: np.ndarray
    rate: int
    offset: int
    period: int


def has_device_form(rate: int, rate_out: int = 16000) -> bool:
    """Whether the rates have a ratio small enough for a convolution; others are resampled on the CPU."""
    return resample_table(rate, rate_out)[1] <= MAX_PHASES // 2


def crop_inputs(
    waveform: np.ndarray,
    rate: int,
    num_samples: int,
    position: float,
    rate_out: int = 16000,
    *,
    begin: int = 0,
    length: int | None = None,
) -> CropInputs:
    """Cut out what the crop or loop at ``position`` needs; arguments as in ``resample_crop_or_loop``."""
    table, up, down = resample_table(rate, rate_out)
    taps = table.shape[1] // 2
    resampled = resampled_length(len(waveform) if length is None else length, up, down)
    start = crop_start(position, resampled, num_samples)
    is_long = resampled >= num_samples
    block = start // up if is_long else 0  # the convolution gives whole blocks of ``up`` outputs
    offset = start - block * up
    count = offset + num_samples if is_long else resampled
    blocks = -(-count // up)
    first = block * down - taps
    samples = np.zeros((blocks - 1) * down + _reach(up, down, taps), waveform.dtype)
    left = first - begin  # of the samples wanted, in ``waveform``
    inside = waveform[max(left, 0) : max(left + len(samples), 0)]
    samples[max(-left, 0) : max(-left, 0) + len(inside)] = inside
    return CropInputs(samples, rate, offset, blocks * up if is_long else resampled)


def resample_on_device(
    crops: list[CropInputs], num_samples: int, device: torch.device | str, rate_out: int = 16000
) -> torch.Tensor:
    """Resample a batch on ``device``, clips of one rate together; int16 samples cross the bus as they are.

    Returns:
        (B, num_samples) float32, within float32 rounding of ``resample_crop_or_loop`` row by row.
    """
    rows = torch.empty(len(crops), num_samples, device=device)
    for rate, dtype in sorted({(crop.rate, crop.samples.dtype.name) for crop in crops}):
        places = [i for i, crop in enumerate(crops) if (crop.rate, crop.samples.dtype) == (rate, dtype)]
        own = [crops[place] for place in places]
        longest = max(len(crop.samples) for crop in own)
        pinned = torch.device(device).type == "cuda"
        samples = torch.zeros(len(own), longest, dtype=getattr(torch, dtype), pin_memory=pinned)
        for row, crop in zip(samples, own, strict=True):
            row[: len(crop.samples)] = torch.from_numpy(crop.samples)
        samples = samples.to(device, non_blocking=True)
        samples = samples * INT16_SCALE if dtype == "int16" else samples
        out = _convolve(samples, rate, rate_out)
        offset = torch.tensor([crop.offset for crop in own], device=device)[:, None]
        period = torch.tensor([crop.period for crop in own], device=device)[:, None]
        index = (offset + torch.arange(num_samples, device=device)) % period
        rows[torch.tensor(places, device=device)] = out.gather(1, index)
    return rows


def _convolve(samples: torch.Tensor, rate: int, rate_out: int) -> torch.Tensor:
    """(B, L) -> (B, blocks * up): every output of every whole block."""
    _, up, down = resample_table(rate, rate_out)
    if up == down:
        return samples
    weight = _filters(rate, rate_out, samples.device)
    return F.conv1d(samples[:, None], weight, stride=down).transpose(1, 2).reshape(len(samples), -1)


def _reach(up: int, down: int, taps: int) -> int:
    """Inputs that one block of outputs looks at."""
    return (up - 1) * down // up + 2 * taps + 1


@functools.lru_cache(maxsize=32)
def _filters(rate: int, rate_out: int, device: torch.device) -> torch.Tensor:
    """(up, 1, reach) float32: the table's rows, each where its output's inputs lie in a block; kept on the device."""
    table, up, down = resample_table(rate, rate_out)
    width = table.shape[1]
    filters = torch.zeros(up, 1, _reach(up, down, width // 2))
    for output in range(up):
        q, row = output * down // up, output * down % up
        filters[output, 0, q : q + width] = torch.from_numpy(table[row])
    return filters.to(device)
