"""Resampling: no alias, no lost band, and a crop that is the crop of the whole."""

import numpy as np
import pytest
import scipy.signal

import fastsskd_kernels as kernels

RATES = [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000]


def tone(pitch, rate, seconds=1.0):
    return np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("pitch", [100, 1000, 3000, 6900])
def test_a_tone_in_the_band_keeps_level_pitch_and_phase(rate, pitch):
    if pitch > 0.87 * rate / 2:
        pytest.skip("above the file's own band")
    out = kernels.resample_crop_or_loop(tone(pitch, rate), rate, 16000)
    np.testing.assert_allclose(out[300:-300], tone(pitch, 16000)[300:-300], atol=2e-3)


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate > 16000])
@pytest.mark.parametrize("pitch", [8100, 9000, 10000, 12000, 15000, 20000, 40000])
def test_a_tone_above_the_new_nyquist_frequency_is_gone(rate, pitch):
    if pitch >= rate / 2:
        pytest.skip("cannot be in the file")
    out = kernels.resample_crop_or_loop(tone(pitch, rate), rate, 16000)
    assert np.abs(out[300:-300]).max() < 1e-3  # 60 dB down


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_same_as_scipys_polyphase_filter(rate):
    """The same windowed sinc through an independent implementation."""
    samples = np.random.default_rng(rate).standard_normal(rate // 4).astype(np.float32)
    table, up, down = kernels.resample_table(rate)
    taps = table.shape[1] // 2
    prototype = np.zeros((2 * taps + 1) * up)  # row r, tap j is the filter at (r / up - j) input samples
    for row in range(up):
        for place, j in enumerate(range(-taps, taps + 1)):
            prototype[(row - j * up) + taps * up] = table[row, place]
    full = scipy.signal.upfirdn(prototype, samples.astype(np.float64), up, 1)[taps * up :: down]
    expected = full[: kernels.resampled_length(len(samples), up, down)]
    np.testing.assert_allclose(kernels.resample_crop_or_loop(samples, rate, len(expected)), expected, atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 44056])
@pytest.mark.parametrize("position", [0.0, 0.4, 0.9999])
def test_a_crop_is_the_crop_of_the_whole_clip(rate, position):
    samples = np.random.default_rng(1).standard_normal(rate).astype(np.float32)
    _, up, down = kernels.resample_table(rate)
    length = kernels.resampled_length(rate, up, down)
    whole = kernels.resample_crop_or_loop(samples, rate, length)
    for num_samples in (1, 4000, length, length + 1, 3 * length + 17):
        start = kernels.crop_start(position, length, num_samples)
        expected = kernels.crop_or_loop(whole, num_samples, start)
        out = kernels.resample_crop_or_loop(samples, rate, num_samples, position)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 44056])
def test_a_crop_needs_its_own_samples_only(rate):
    """What lies outside of the range that is told may be anything: here it is cut off, or NaN."""
    samples = np.random.default_rng(2).standard_normal(2 * rate).astype(np.float32)
    for num_samples in (1, 4000, 31999, 40000):
        for position in (0.0, 0.37, 0.9999):
            expected = kernels.resample_crop_or_loop(samples, rate, num_samples, position)
            begin, end = kernels.crop_inputs_range(len(samples), rate, num_samples, position)
            assert 0 <= begin < end <= len(samples)
            assert end - begin <= min(len(samples), (num_samples + 90) * max(rate / 16000, 1.0) + 2)
            part, where = samples[begin:end].copy(), {"begin": begin, "length": len(samples)}
            out = kernels.resample_crop_or_loop(part, rate, num_samples, position, **where)
            np.testing.assert_array_equal(out, expected)
            if kernels.has_device_form(rate):
                inputs = kernels.crop_inputs(part, rate, num_samples, position, **where)
                whole = kernels.crop_inputs(samples, rate, num_samples, position)
                on_device = [kernels.resample_on_device([i], num_samples, "cpu") for i in (inputs, whole)]
                np.testing.assert_allclose(on_device[0], on_device[1], atol=1e-6)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_16_bit_samples_give_what_their_floats_give(rate):
    samples = np.random.default_rng(3).integers(-32768, 32768, rate, dtype=np.int16)
    as_float = samples.astype(np.float32) / 32768
    for num_samples in (4000, 20000):
        expected = kernels.resample_crop_or_loop(as_float, rate, num_samples, 0.3)
        np.testing.assert_array_equal(kernels.resample_crop_or_loop(samples, rate, num_samples, 0.3), expected)
        inputs = [kernels.crop_inputs(clip, rate, num_samples, 0.3) for clip in (samples, as_float)]
        assert inputs[0].samples.dtype == np.int16
        both = kernels.resample_on_device(inputs, num_samples, "cpu")
        np.testing.assert_allclose(both[0], both[1], atol=1e-6)


def test_rates_without_a_small_ratio():
    out = kernels.resample_crop_or_loop(tone(1000, 44101), 44101, 16000)
    np.testing.assert_allclose(out[300:-300], tone(1000, 16000)[300:-300], atol=2e-3)
    assert len(kernels.resample_table(44101)[0]) == 2048


def test_very_short_and_empty_clips():
    assert np.isfinite(kernels.resample_crop_or_loop(np.ones(1, np.float32), 44100, 100)).all()
    with pytest.raises(ValueError, match="waveform"):
        kernels.resample_crop_or_loop(np.empty(0, np.float32), 44100, 100)


@pytest.mark.parametrize("num_samples", [1, 3000, 16000, 40000])
def test_the_convolution_for_a_gpu_gives_the_same(num_samples):
    """A batch of clips of many rates and lengths, crops and loops; here on the CPU, where the same code runs."""
    random = np.random.default_rng(num_samples)
    clips, expected = [], []
    for rate in RATES:
        for length in (1, 500, rate // 2, 2 * rate):
            samples, position = random.standard_normal(length).astype(np.float32), random.random()
            assert kernels.has_device_form(rate)
            clips.append(kernels.crop_inputs(samples, rate, num_samples, position))
            expected.append(kernels.resample_crop_or_loop(samples, rate, num_samples, position))
    out = kernels.resample_on_device(clips, num_samples, "cpu")
    np.testing.assert_allclose(out.numpy(), np.stack(expected), atol=2e-5)


def test_only_the_crops_inputs_go_to_the_device():
    hour = np.zeros(44100 * 600, np.float32)
    crop = kernels.crop_inputs(hour, 44100, 160000, 0.7)
    assert len(crop.samples) < 44100 * 10.1


def test_rates_without_a_small_ratio_have_no_device_form():
    assert not kernels.has_device_form(44101) and kernels.has_device_form(11025)
