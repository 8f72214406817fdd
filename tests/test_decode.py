"""The DALI pipeline: what comes out of it, and how it fails."""

import weakref

import damaged_audio
import numpy as np
import pytest
from nvidia.dali import ops

from fastsskd.decode import DecodeError, Decoder

BAD = np.frombuffer(b"no audio at all" * 10, np.uint8)


def encoded(samples, rate, kind="WAV", subtype="FLOAT"):
    return np.frombuffer(damaged_audio.encode(samples.astype(np.float32), rate, kind, subtype), np.uint8)


def test_samples_come_out_as_they_are_at_their_own_rate():
    ramps = [np.linspace(-0.5, 0.5, size).astype(np.float32) for size in (16000, 7, 44100)]
    out = Decoder(4).decode([encoded(ramp, rate) for ramp, rate in zip(ramps, (16000, 8000, 44100), strict=True)])
    assert [clip.rate for clip in out] == [16000, 8000, 44100]
    for clip, ramp in zip(out, ramps, strict=True):
        np.testing.assert_array_equal(clip.samples, ramp)


def test_stereo_is_averaged():
    left, right = np.linspace(-0.5, 0.5, 16000), np.linspace(0.25, 0.75, 16000)
    (clip,) = Decoder(4).decode([encoded(np.stack([left, right], 1), 16000)])
    np.testing.assert_allclose(clip.samples, (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("name", ["flac24_stereo.flac", "vorbis.ogg", "extensible.wav", "pcm16.aiff", "rf64.wav"])
def test_formats(name):
    (clip,) = Decoder(4).decode([np.frombuffer(damaged_audio.good_clips()[name], np.uint8)])
    expected = damaged_audio.tone()
    assert len(clip.samples) / clip.rate == pytest.approx(len(expected) / damaged_audio.RATE, abs=1e-3)
    assert np.sqrt(np.mean(clip.samples**2)) > 0.1


def test_a_refused_file_does_not_end_the_decoder():
    good = encoded(np.linspace(0, 0.5, 16000), 16000)
    decoder = Decoder(2)
    for files in ([good], [good, BAD], [BAD], [good, good], [BAD, good], [good]):
        if any(file is BAD for file in files):
            with pytest.raises(DecodeError) as error:
                decoder.decode(files)
            assert str(error.value) and "\n" not in str(error.value)
        else:
            clips = decoder.decode(files)
            assert len(clips) == len(files)
            for clip in clips:
                np.testing.assert_array_equal(clip.samples, np.linspace(0, 0.5, 16000, dtype=np.float32))


def test_a_forgotten_decoder_is_gone():
    decoder = Decoder(2)
    reference = weakref.ref(decoder)
    del decoder
    assert reference() is None


def test_dali_decodes_on_the_cpu_only():
    """Why the pipeline is the same on a GPU box: should this fail, decoding on the device has become possible."""
    assert "decoders__Audio" in ops.cpu_ops()
    assert "decoders__Audio" not in ops.gpu_ops() | ops.mixed_ops()
