"""Audio files in formats that soundfile does not write, as bytes, for every test that needs some; made with PyAV."""

import functools
import io
from fractions import Fraction

import numpy as np
import pytest

SECONDS = 2.0

# Name: container, codec, rate (Hz), channels, with pictures. All are of `tone`.
FORMATS = {
    "aac.m4a": ("ipod", "aac", 44_100, 1, False),
    "alac.m4a": ("ipod", "alac", 44_100, 2, False),
    "video.mp4": ("mp4", "aac", 48_000, 2, True),
    "opus.webm": ("webm", "libopus", 48_000, 1, False),
    "video.webm": ("webm", "libopus", 48_000, 2, True),
    "flac.mkv": ("matroska", "flac", 44_100, 1, False),
    "mp3.mp3": ("mp3", "libmp3lame", 44_100, 2, False),
    "layer2.mp2": ("mp2", "mp2", 32_000, 1, False),
    "adts.aac": ("adts", "aac", 22_050, 1, False),
    "wma.wma": ("asf", "wmav2", 44_100, 1, False),
    "amr.amr": ("amr", "libopencore_amrnb", 8_000, 1, False),
    "wavpack.wv": ("wv", "wavpack", 44_100, 1, False),
    "pcm.caf": ("caf", "pcm_s16le", 44_100, 2, False),
    "pcm.au": ("au", "pcm_s16be", 44_100, 1, False),
    "pcm.w64": ("w64", "pcm_s24le", 44_100, 1, False),
    "mp3_in.wav": ("wav", "libmp3lame", 44_100, 1, False),
    "mp3.avi": ("avi", "libmp3lame", 44_100, 1, True),
}


@functools.cache
def tone(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """(S,) float32: a rising tone in noise, peak about 0.4; the same sound at every rate but for the noise."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(5).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * 440 * time * (1 + time / 4)) + 0.01 * noise).astype(np.float32)


@functools.cache
def clip(name: str, seconds: float = SECONDS) -> bytes:
    """The file of this name in `FORMATS`; the test is skipped where PyAV is not installed."""
    pytest.importorskip("av", reason="needs PyAV: pip install 'fastsskd[formats]'")
    return write(*FORMATS[name], seconds=seconds)


def write(
    container: str,
    codec: str,
    rate: int,
    channels: int,
    video: bool,
    *,
    seconds: float = SECONDS,
    sound: bool = True,
    **options,
) -> bytes:
    """A file of `tone`; every channel the same. `options` are the container's."""
    import av

    file = io.BytesIO()
    layout = "mono" if channels == 1 else "stereo"
    with av.open(file, "w", format=container, options=options) as output:
        audio = output.add_stream(codec, rate=rate, layout=layout) if sound else None
        if codec == "wmav2":
            audio.bit_rate = 64_000
        if video:
            _write_pictures(output, "libvpx" if container == "webm" else "mpeg4", seconds)
        if sound:
            samples = np.repeat(tone(rate, seconds)[None], channels, axis=0)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            output.mux(audio.encode(frame))
            output.mux(audio.encode(None))
    return file.getvalue()


def _write_pictures(output, codec: str, seconds: float) -> None:
    import av

    pictures = output.add_stream(codec, rate=10)
    pictures.width = pictures.height = 32
    pictures.pix_fmt = "yuv420p"
    for number in range(round(seconds * 10)):
        picture = np.full((32, 32, 3), number * 5 % 255, np.uint8)
        output.mux(pictures.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    output.mux(pictures.encode(None))


def damaged(data: bytes, how: str) -> bytes:
    """The file cut, with a hole, or partly blank."""
    middle = len(data) // 2
    return {
        "cut in the middle": data[: int(len(data) * 0.45)],
        "cut near the end": data[: int(len(data) * 0.9)],
        "hole": data[:middle] + data[middle + 3000 :],
        "blank": data[:middle] + bytes(2000) + data[middle + 2000 :],
    }[how]
