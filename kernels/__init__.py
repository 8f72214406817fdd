"""Array in, array out: features, patch statistics, masks and random numbers of fastsskd.

Every operation has a torch reference, which runs on any device and is the truth; where speed on a CPU counts there is a
numba version beside it that gives the same numbers. Nothing here keeps state or hides a random draw, and nothing but
``wav_features`` reads a file.
"""

from fastsskd_kernels.backend import resolve_backend
from fastsskd_kernels.crop import crop_or_loop, crop_start, downmix
from fastsskd_kernels.fbank import fbank
from fastsskd_kernels.fbank_matrix import fbank_matrices
from fastsskd_kernels.features import features, pad_frames, padded_frames
from fastsskd_kernels.flac import FLAC_PADDING, decode_flac
from fastsskd_kernels.hog import hog, hog_patch_mean
from fastsskd_kernels.kaldi import num_frames
from fastsskd_kernels.masks import inter_patch_mask, intra_patch_mask, patch_weight
from fastsskd_kernels.random import derive_seed, derive_seeds, random_bits, uniform
from fastsskd_kernels.resample import crop_inputs_range, resample_crop_or_loop, resample_table, resampled_length
from fastsskd_kernels.resample_torch import CropInputs, crop_inputs, has_device_form, resample_on_device
from fastsskd_kernels.wav import wav_features, wav_memory

__all__ = [
    "FLAC_PADDING",
    "CropInputs",
    "crop_inputs",
    "crop_inputs_range",
    "crop_or_loop",
    "crop_start",
    "decode_flac",
    "derive_seed",
    "derive_seeds",
    "downmix",
    "fbank",
    "fbank_matrices",
    "features",
    "has_device_form",
    "hog",
    "hog_patch_mean",
    "inter_patch_mask",
    "intra_patch_mask",
    "num_frames",
    "pad_frames",
    "padded_frames",
    "patch_weight",
    "random_bits",
    "resample_crop_or_loop",
    "resample_on_device",
    "resample_table",
    "resampled_length",
    "resolve_backend",
    "uniform",
    "wav_features",
    "wav_memory",
]
