"""What people use today for the same features, one function per peer: (clip) -> features, built once, called often."""

import numpy as np
import nvidia.dali
import torch
import torchaudio
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.numba.fn.experimental import numba_function
from skimage.feature import hog as skimage_hog

from fastsskd_kernels import fbank_cpu, kaldi
from fastsskd_kernels.features import features_batch

DALI_BATCH = 16


def dali_version() -> str:
    return nvidia.dali.__version__


def torchaudio_fbank(clip: torch.Tensor) -> torch.Tensor:
    """torchaudio's Kaldi fbank, which AST's and most teachers' code calls once per clip."""
    return torchaudio.compliance.kaldi.fbank(
        clip[None], htk_compat=True, window_type="hanning", num_mel_bins=128, use_energy=False, dither=0.0
    )


class NumpyFbank:
    """The same formula the way librosa computes spectrograms: strided frames, numpy.fft, a dense mel product."""

    def __init__(self):
        self.window = kaldi.window_values("hanning", 400).numpy()
        self.banks = kaldi.mel_banks(128, 512, 16000).numpy().T.copy()

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        frames = np.lib.stride_tricks.sliding_window_view(clip, 400)[::160]
        frames = frames - frames.mean(1, keepdims=True)
        emphasised = frames - np.float32(0.97) * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
        power = np.abs(np.fft.rfft(emphasised * self.window, n=512)) ** 2
        return np.log(np.maximum(power[:, :-1] @ self.banks, np.float32(kaldi.LOG_FLOOR)))


def skimage_patches(fbank: np.ndarray) -> np.ndarray:
    """scikit-image's HOG on 16 x 16 cells, one cell per block."""
    return skimage_hog(fbank, 9, (16, 16), (1, 1), feature_vector=False)


class DaliFbank:
    """DALI's own operators, one thread: pre-emphasis, spectrogram, mel, log. Not Kaldi's numbers: no DC removal."""

    def __init__(self, clips: np.ndarray):
        @pipeline_def(batch_size=DALI_BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def pipeline():
            audio = fn.external_source(source=lambda: list(clips), no_copy=True, dtype=types.FLOAT, ndim=1)
            audio = fn.preemphasis_filter(audio, preemph_coeff=0.97)
            window = kaldi.window_values("hanning", 400).tolist()
            power = fn.spectrogram(
                audio, nfft=512, window_length=400, window_step=160, center_windows=False, window_fn=window
            )
            mel = fn.mel_filter_bank(
                power, sample_rate=16000.0, nfilter=128, freq_low=20.0, normalize=False, mel_formula="htk"
            )
            return fn.to_decibels(mel, multiplier=2.302585, reference=1.0, cutoff_db=-15.942385)

        self.pipeline = pipeline()
        self.pipeline.build()

    def __call__(self) -> np.ndarray:
        """One batch of DALI_BATCH clips: (DALI_BATCH, 128, 998)."""
        return self.pipeline.run()[0]


class DaliNumbaFeatures:
    """Our fused kernel called by DALI's ``numba_function``, for comparison with Python threads beside DALI."""

    def __init__(self, clips: np.ndarray, threads: int):
        plan = fbank_cpu.make_plan(16000, 128, "hanning")
        shift, window, root, half_root, place, bin_start, bin_row, bin_weight = plan
        make = fbank_cpu.Plan

        def setup(outs, ins):
            for i in range(len(outs[0])):
                outs[0][i][0], outs[0][i][1] = 1024, 128
                outs[1][i][0] = 512

        def run(fbank, hog, samples):
            plan = make(shift, window, root, half_root, place, bin_start, bin_row, bin_weight)
            norm = np.float32(-4.2677393), np.float32(0.5 / 4.5689974)
            features_batch(
                samples.reshape(1, -1),
                np.float32(1 / 32768),
                998,
                plan,
                norm,
                16,
                fbank.reshape(1, 1024, 128),
                hog.reshape(1, -1),
            )

        @pipeline_def(batch_size=DALI_BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=1)
        def pipeline():
            audio = fn.external_source(source=lambda: list(clips), no_copy=True, dtype=types.INT16, ndim=1)
            fbank, hog = numba_function(
                audio,
                run_fn=run,
                setup_fn=setup,
                in_types=[types.INT16],
                ins_ndim=[1],
                out_types=[types.FLOAT, types.FLOAT],
                outs_ndim=[2, 1],
            )
            return fbank, hog

        self.pipeline = pipeline()
        self.pipeline.build()

    def __call__(self) -> tuple:
        return self.pipeline.run()
