"""fbank is Kaldi's: against torchaudio's implementation for one clip, and against the same formula in float64.

What float32 can promise. A bin far below the loudest one of its frame holds mostly the rounding of the loud ones: there
torchaudio itself is off the float64 result by up to 1 in log-mel (a pure tone at 2^15 scale). So the bound against
torchaudio, 2e-3 at most and 1e-5 on average, is demanded of bins within 60 dB of the loudest; the amplitude of every
bin must be that of float64 to within 1e-5 of the loudest (100 dB).
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsskd_kernels as kernels
from fastsskd_kernels import crop, fbank_cpu, kaldi
from fastsskd_kernels.features import features_batch

RATES = (8000, 16000, 22050, 32000, 44100, 48000)
BACKENDS = ("torch", "numba")
ESC10 = Path(__file__).parents[2] / "shared/data/esc10"
WINDOW_SCALES = {"hanning": 1.0, "povey": 32768.0}  # as AST and as BEATs call it
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def torchaudio_fbank(clip, rate, window, num_mel_bins=128):
    return torchaudio.compliance.kaldi.fbank(
        clip[None],
        sample_frequency=rate,
        window_type=window,
        num_mel_bins=num_mel_bins,
        htk_compat=True,
        use_energy=False,
        dither=0.0,
    )


def float64_fbank(clip, rate, window):
    """Kaldi's formula, one step per line, in float64."""
    length, shift, padded = kaldi.frame_samples(rate)
    frames = clip.double().unfold(0, length, shift)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    frames = (frames - 0.97 * before) * kaldi.window_values(window, length).double()
    power = torch.fft.rfft(frames, n=padded).abs() ** 2
    return (power[:, :-1] @ kaldi.mel_banks(128, padded, rate).double().T).clamp(min=kaldi.LOG_FLOOR).log()


def check_against_torchaudio(clip, rate, window, name):
    """Both backends on one clip."""
    expected, exact = torchaudio_fbank(clip, rate, window), float64_fbank(clip, rate, window)
    amplitude = torch.exp(exact / 2)
    loudest = amplitude.amax(1, keepdim=True)
    for backend in BACKENDS:
        result = kernels.fbank(clip[None], sample_rate=rate, window=window, backend=backend)[0]
        assert result.shape == expected.shape and result.isfinite().all(), (name, backend)
        difference = (result - expected).abs()[amplitude >= 1e-3 * loudest]
        found = f"{name}, {backend}: {difference.max():.1e} at most, {difference.mean():.1e} on average"
        assert difference.max() <= 2e-3 and difference.mean() <= 1e-5, found
        error = ((torch.exp(result.double() / 2) - amplitude).abs() / loudest).max()
        assert error <= 1e-5, f"{name}, {backend}: amplitude off by {error:.1e} of the loudest bin"


def signals(rate):
    """Name and 0.4 s of audio, float64, mostly within [-1, 1]."""
    samples = 2 * rate // 5
    time, noise = np.arange(samples) / rate, np.random.default_rng(0).standard_normal(samples)
    harmonics = sum(np.sin(2 * np.pi * 220 * h * time) / h for h in range(1, 12))
    music = 0.2 * harmonics * (1 + 0.5 * np.sin(2 * np.pi * 3 * time))
    pulses = (np.arange(samples) % (rate // 120) == 0).astype(float)
    ringing = np.exp(-np.arange(200) / 30) * np.sin(0.3 * np.arange(200))
    speech = 0.3 * np.convolve(pulses, ringing)[:samples] * (np.sin(14 * np.pi * time) > -0.3) + 1e-4 * noise
    yield "white noise", 0.1 * noise
    yield "music-like", music
    yield "speech-like", speech
    yield "pure tone", 0.5 * np.sin(2 * np.pi * 1000 * time)
    yield "large DC offset", 0.9 + 1e-2 * noise
    yield "DC offset and tone", 0.5 + 0.3 * np.sin(2 * np.pi * 1000 * time)
    yield "clipped music", np.clip(4 * music, -1, 1)
    yield "clipped noise", np.clip(noise, -1, 1)
    yield "clicks", 0.9 * (np.arange(samples) % 4001 == 0)
    yield "quiet", 1e-6 * noise
    yield "denormal", 1e-40 * noise
    yield "silence", 0.0 * noise


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("num_mel_bins", [23, 64, 128])
def test_tables_are_torchaudios_bit_by_bit(rate, num_mel_bins):
    length, _, padded = kaldi.frame_samples(rate)
    banks, _ = torchaudio.compliance.kaldi.get_mel_banks(num_mel_bins, padded, rate, 20.0, 0.0, 100.0, -500.0, 1.0)
    assert torch.equal(kaldi.mel_banks(num_mel_bins, padded, rate), banks)
    hann = torch.hann_window(length, periodic=False)
    assert torch.equal(kaldi.window_values("hanning", length), hann)
    assert torch.equal(kaldi.window_values("povey", length), hann.pow(0.85))


@pytest.mark.parametrize("window", ["hanning", "povey"])
@pytest.mark.parametrize("rate", RATES)
def test_matches_torchaudio(rate, window):
    for name, audio in signals(rate):
        clip = torch.tensor(audio * WINDOW_SCALES[window], dtype=torch.float32)
        check_against_torchaudio(clip, rate, window, name)


@pytest.mark.skipif(not ESC10.is_dir(), reason="the ESC-10 clips are not beside this checkout")
def test_matches_torchaudio_on_real_clips():
    soundfile = pytest.importorskip("soundfile")
    for path in sorted((ESC10 / "audio").iterdir())[::64]:
        stored, rate = soundfile.read(path, frames=2 * 44100, dtype="float32")
        stored = torch.from_numpy(stored)
        resampled = torchaudio.functional.resample(stored, rate, 16000)
        for window, scale in WINDOW_SCALES.items():
            check_against_torchaudio(stored * scale, rate, window, path.name)
            check_against_torchaudio(resampled * scale, 16000, window, path.name)


@pytest.mark.parametrize(
    ("samples", "frames"), [(400, 1), (401, 1), (559, 1), (560, 2), (2960, 17), (80000, 498), (160000, 998)]
)
def test_lengths(samples, frames):
    clip = torch.randn(samples, generator=torch.Generator().manual_seed(samples)) * 0.1
    check_against_torchaudio(clip, 16000, "hanning", f"{samples} samples")
    assert kernels.num_frames(samples) == frames == kernels.fbank(clip[None]).shape[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_silence_is_the_floor(backend):
    result = kernels.fbank(torch.zeros(2, 16000), backend=backend)
    torch.testing.assert_close(result, torch.full_like(result, np.log(kaldi.LOG_FLOOR)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_sample_spoils_its_frames_and_no_others(bad, backend):
    clean = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    spoiled = clean.clone()
    spoiled[1, 8000] = bad
    start = 160 * torch.arange(kernels.num_frames(16000))
    hit = (start <= 8000) & (start + 400 > 8000)
    expected = kernels.fbank(clean, backend=backend)
    expected[1, hit] = torch.nan
    torch.testing.assert_close(kernels.fbank(spoiled, backend=backend), expected, equal_nan=True)
    *_, hog = kernels.features(clean, backend=backend)
    *_, spoiled_hog = kernels.features(spoiled, backend=backend)
    assert spoiled_hog[0].equal(hog[0]) and spoiled_hog.isfinite().all(1).tolist() == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_int16_is_float32_over_32768(backend):
    clip = torch.randint(-32768, 32767, (2, 16000), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    expected = kernels.fbank(clip.float() / 32768, backend=backend)
    assert torch.equal(kernels.fbank(clip, backend=backend), expected)


def test_a_clip_does_not_depend_on_its_batch_or_memory_layout():
    clips = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0))
    together = kernels.fbank(clips)
    for clip, result in zip(clips, together, strict=True):
        assert torch.equal(kernels.fbank(clip[None])[0], result)
    strided = torch.stack([clips, clips], dim=2)[:, :, 1]
    assert not strided.is_contiguous() and torch.equal(kernels.fbank(strided), together)


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    samples=st.integers(400, 6000),
    num_mel_bins=st.integers(1, 160),
    window=st.sampled_from(["hanning", "povey"]),
    seed=st.integers(0, 2**31),
)
def test_numba_equals_torch_for_any_shape(batch, samples, num_mel_bins, window, seed):
    clips = torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))
    options = {"num_mel_bins": num_mel_bins, "window": window}
    fast, exact = kernels.fbank(clips, **options), kernels.fbank(clips, **options, backend="torch")
    assert fast.shape == exact.shape == (batch, kernels.num_frames(samples), num_mel_bins)
    torch.testing.assert_close(fast, exact, atol=2e-3, rtol=0)


@settings(deadline=None, max_examples=20)
@given(dtype=st.sampled_from([torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool]))
def test_other_dtypes_are_errors(dtype):
    with pytest.raises(ValueError, match="expected float32 or int16"):
        kernels.fbank(torch.zeros(1, 16000, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 399), {}, "399 samples are shorter than one frame .400 samples at 16000 Hz"),
        ((1, 1199), {"sample_rate": 48000}, "1199 samples are shorter than one frame"),
        ((16000,), {}, r"\(B >= 1, S\)"),
        ((0, 16000), {}, r"\(B >= 1, S\)"),
        ((1, 1, 16000), {}, r"\(B >= 1, S\)"),
        ((1, 16000), {"window": "hamming"}, "window='hamming'"),
        ((1, 16000), {"sample_rate": 100}, "sample_rate=100"),
        ((1, 16000), {"num_mel_bins": 0}, "num_mel_bins=0"),
        ((1, 16000), {"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_wrong_arguments_are_one_line(shape, options, message):
    with pytest.raises(ValueError, match=message) as error:
        kernels.fbank(torch.zeros(shape), **options)
    assert "\n" not in str(error.value)


def test_backends_say_what_they_cannot_take():
    clip = torch.zeros(1, 16000)
    assert kernels.resolve_backend("auto", clip) == "numba"
    assert kernels.resolve_backend("auto", clip.to("meta")) == "torch"
    with pytest.raises(ValueError, match="backend='numba' takes CPU tensors, got one on meta"):
        kernels.fbank(clip.to("meta"), backend="numba")
    for operation in (kernels.fbank, kernels.features):
        with pytest.raises(ValueError, match="no gradient passes"):
            operation(clip.clone().requires_grad_())


def test_the_reference_needs_no_value_on_the_host():
    """On the meta device there are no values: any ``.item()`` or data-dependent shape would raise."""
    fbank, hog = kernels.features(torch.empty(2, 160000, device="meta"), backend="torch")
    assert fbank.shape == (2, 1024, 128) and hog.shape == (2, 512)


def test_the_reference_ignores_autocast_and_reduced_matmul_precision():
    clip = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    expected = kernels.fbank(clip, backend="torch")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(kernels.fbank(clip, backend="torch"), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_log_of_every_exponent():
    """The polynomial against NumPy over the float32 range above the floor, and at its special values."""
    exponents = np.exp2(np.linspace(-24, 127.9, 200_001)).astype(np.float32)
    special = np.array([0.0, 1.0, kaldi.LOG_FLOOR, np.sqrt(0.5), np.sqrt(2.0), 3.4028235e38], np.float32)
    for x in (exponents, special):
        expected = np.log(np.maximum(x, np.float32(kaldi.LOG_FLOOR)).astype(np.float64))
        result = x.copy()
        fbank_cpu.log_inplace(result)
        np.testing.assert_allclose(result, expected, rtol=1.5e-7, atol=6e-8)
    undefined = np.array([np.nan, np.inf], np.float32)
    fbank_cpu.log_inplace(undefined)
    assert np.isnan(undefined[0]) and undefined[1] == np.inf


def test_threads_share_nothing():
    clips = torch.randn(8, 16000, generator=torch.Generator().manual_seed(0))
    expected = kernels.fbank(clips)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: kernels.fbank(clips[i : i + 1])[0], [0, 1, 2, 3, 4, 5, 6, 7] * 4))
    assert torch.equal(torch.stack(results), expected.repeat(4, 1, 1))
    compiled = fbank_cpu.fbank_batch, features_batch, crop._copy_looped
    assert all(function.targetoptions["nogil"] for function in compiled)


def test_pad_frames():
    fbank = torch.arange(12.0).reshape(1, 3, 4)
    assert kernels.pad_frames(fbank, 3) is fbank
    assert torch.equal(kernels.pad_frames(fbank, 5), torch.cat([fbank, torch.zeros(1, 2, 4)], 1))
    assert torch.equal(kernels.pad_frames(fbank, 5, "repeat"), fbank[:, [0, 1, 2, 2, 2]])
    for length, mode in ((2, "zero"), (5, "reflect")):
        with pytest.raises(ValueError):
            kernels.pad_frames(fbank, length, mode)
    assert (kernels.padded_frames(160000), kernels.padded_frames(80000)) == (1024, 512)


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 50),
    num_samples=st.integers(1, 200),
    position=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from([np.float32, np.int16]),
)
def test_crop_or_loop_equals_its_reference(length, num_samples, position, dtype):
    waveform = (np.arange(length) * 300 - 5000).astype(dtype)
    start = kernels.crop_start(position, length, num_samples)
    result = kernels.crop_or_loop(waveform, num_samples, start)
    assert result.dtype == np.float32 and result.shape == (num_samples,)
    np.testing.assert_array_equal(result, crop.crop_or_loop_reference(waveform, num_samples, start))
    scale = 32768 if dtype == np.int16 else 1
    rotated = np.roll(waveform, -start) if length < num_samples else waveform[start:]
    np.testing.assert_array_equal(result * scale, np.resize(rotated, num_samples))


def test_every_start_is_equally_likely():
    positions = (np.arange(1200) + 0.5) / 1200
    for length, num_samples, choices in ((10, 8, 3), (8, 8, 1), (6, 8, 6)):
        starts = [kernels.crop_start(p, length, num_samples) for p in positions]
        assert np.bincount(starts).tolist() == [1200 // choices] * choices


def test_crop_or_loop_writes_where_it_is_told_and_refuses_the_rest(tmp_path):
    shard = np.lib.format.open_memmap(tmp_path / "shard.npy", mode="w+", dtype=np.int16, shape=(100,))
    shard[:] = np.arange(100)
    shard.flush()
    shard = np.load(tmp_path / "shard.npy", mmap_mode="r")
    out = np.full((2, 8), -1.0, np.float32)
    assert kernels.crop_or_loop(shard[10:20], 8, 1, out=out[1]).base is out
    np.testing.assert_array_equal(out[1] * 32768, np.arange(11, 19))
    ramp = np.arange(10, dtype=np.float32)
    wrong = [(ramp[:0], 4, 0), (ramp, 0, 0), (ramp, 4, 7), (ramp, 20, 10), (ramp, 4, -1), (ramp[None], 4, 0)]
    for waveform, num_samples, start in [*wrong, (ramp.astype(np.float64), 4, 0)]:
        with pytest.raises(ValueError):
            kernels.crop_or_loop(waveform, num_samples, start)
    with pytest.raises(ValueError, match="out: expected float32"):
        kernels.crop_or_loop(ramp, 4, 0, out=np.empty(4))


def run_in_a_copy(folder, home):
    """Loop a clip with the package copied into ``folder``: cache hits of the compiled function, and warnings."""
    program = (
        "import numpy as np, fastsskd_kernels as k; assert k.__file__.startswith(%r), k.__file__;"
        "k.crop_or_loop(np.ones(3, np.float32), 5); print(sum(k.crop._copy_looped.stats.cache_hits.values()))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": str(folder), "HOME": str(home)}
    command = [sys.executable, "-c", program % str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout), done.stderr


@pytest.fixture
def package_copy(tmp_path):
    shutil.copytree(
        Path(kernels.__file__).parent, tmp_path / "fastsskd_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


def test_a_read_only_install_uses_the_users_cache_and_says_so(package_copy):
    """A file in place of ``__pycache__`` refuses to be written into, to the superuser too."""
    (package_copy / "fastsskd_kernels/__pycache__").touch()
    for expected_hits in (0, 1):
        hits, warnings = run_in_a_copy(package_copy, package_copy / "home")
        assert hits == expected_hits and warnings.count("compiled kernels are kept in") == 1


def test_without_any_writable_folder_it_still_runs_and_says_so(package_copy):
    (package_copy / "fastsskd_kernels/__pycache__").touch()
    hits, warnings = run_in_a_copy(package_copy, os.devnull)
    assert hits == 0 and warnings.count("no folder for compiled kernels is writable") == 1


def test_cached_code_does_not_outlive_a_change_in_another_file(package_copy):
    assert run_in_a_copy(package_copy, package_copy)[0] == 0
    assert run_in_a_copy(package_copy, package_copy)[0] == 1
    with open(package_copy / "fastsskd_kernels/simd.py", "a") as file:
        file.write("# changed\n")
    assert run_in_a_copy(package_copy, package_copy)[0] == 0


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("window", ["hanning", "povey"])
def test_gpu_equals_cpu_without_synchronising(window):
    clips = torch.randn(4, 160000, generator=torch.Generator().manual_seed(0)) * 0.1
    expected = kernels.fbank(clips, window=window, backend="torch")
    on_gpu = clips.cuda()
    kernels.features(on_gpu, window=window)  # tables go to the device on the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        result, _ = kernels.fbank(on_gpu, window=window), kernels.features(on_gpu, window=window)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (result.cpu() - expected).abs()
    assert difference.max() <= 2e-3 and difference.mean() <= 1e-5
