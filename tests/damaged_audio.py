"""Audio files that are fine and files that are not, as bytes by file name, for every test that needs some.

for name, data in good_clips().items(): (folder / name).write_bytes(data)
for name, data in bad_clips().items(): ...
"""

import functools
import io
import struct

import numpy as np
import soundfile

RATE = 44_100
"""Hz of the clips below, unless their name says otherwise."""
NUM_SAMPLES = 2 * RATE


@functools.cache
def tone(num_samples: int = NUM_SAMPLES, seed: int = 0) -> np.ndarray:
    """(num_samples,) float32: a rising tone in noise, peak about 0.4."""
    time = np.arange(num_samples) / RATE
    noise = np.random.default_rng(seed).standard_normal(num_samples)
    return (0.3 * np.sin(2 * np.pi * 440 * time * (1 + time)) + 0.02 * noise).astype(np.float32)


def encode(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """An audio file in memory; `kind` and `subtype` as soundfile names them."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@functools.cache
def good_clips() -> dict[str, bytes]:
    """Files that must be used: every format and header that the decoder reads, and odd but honest ones."""
    mono = tone()
    stereo = np.stack([mono, mono[::-1] / 2], axis=1)
    wav, flac, ogg = encode(mono), encode(mono, kind="FLAC"), encode(mono, kind="OGG", subtype="VORBIS")
    return {
        "pcm16.wav": wav,
        "pcm24_stereo.wav": encode(stereo, subtype="PCM_24"),
        "pcm8.wav": encode(mono, subtype="PCM_U8"),
        "float.wav": encode(mono, subtype="FLOAT"),
        "double.wav": encode(mono, subtype="DOUBLE"),
        "mulaw.wav": encode(mono, 8000, subtype="ULAW"),
        "adpcm.wav": encode(mono, subtype="IMA_ADPCM"),
        "extensible.wav": encode(stereo, kind="WAVEX"),
        "rf64.wav": encode(mono, kind="RF64"),
        "channels32.wav": encode(np.repeat(mono[:4000, None], 32, axis=1)),
        "flac16.flac": flac,
        "flac24_stereo.flac": encode(stereo, kind="FLAC", subtype="PCM_24"),
        "vorbis.ogg": ogg,
        "vorbis_stereo_32k.ogg": encode(stereo, 32_000, "OGG", "VORBIS"),
        "opus.opus": encode(mono, 48_000, "OGG", "OPUS"),
        "opus_16k.opus": encode(mono, 16_000, "OGG", "OPUS"),
        "pcm16.aiff": encode(mono, kind="AIFF"),
        "float.aifc": encode(stereo, kind="AIFF", subtype="FLOAT"),
        "silent.wav": encode(np.zeros(NUM_SAMPLES)),
        "silent.flac": encode(np.zeros(NUM_SAMPLES), kind="FLAC"),
        "silent.ogg": encode(np.zeros(NUM_SAMPLES), kind="OGG", subtype="VORBIS"),
        "short.wav": encode(mono[:800]),
        "one_sample.flac": encode(mono[:1], kind="FLAC"),
        "rate_1khz.wav": encode(mono[:4000], 1000),
        "rate_384khz.wav": encode(mono, 384_000),
        "from_a_pipe.wav": _with_data_size(wav, 0xFFFFFFFF, 0xFFFFFFFF),
        "tag_after.wav": wav + b"TAG" + bytes(125),
        "list_before.wav": wav[:12] + b"LIST" + struct.pack("<I", 5) + b"abcde\0" + wav[12:],
        "tag_before.flac": b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + flac,
        "tag_after.flac": flac + b"TAG" + bytes(125),
        "tag_after.ogg": ogg + b"TAG" + bytes(125),
        "wrong_name.wav": flac,
        "float_scaled_to_int16.wav": encode(mono * 32768, subtype="FLOAT"),
    }


@functools.cache
def bad_clips() -> dict[str, bytes]:
    """Files that must be left out and named, none of them with another clip's sound in its place."""
    return _not_audio() | _cut() | _lying() | _unbelievable() | _corrupt()


def _not_audio() -> dict[str, bytes]:
    wav = good_clips()["pcm16.wav"]
    return {
        "empty.wav": b"",
        "empty.flac": b"",
        "text.flac": b"this is not a FLAC file\n" * 50,
        "page.ogg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "json.wav": b'{"error": "quota exceeded"}',
        "noise.wav": np.random.default_rng(3).bytes(5000),
        "zeros.wav": bytes(5000),
        "song.mp3": b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + b"\xff\xfb\x90\x00" + bytes(400),
        "video.webm": b"\x1aE\xdf\xa3" + bytes(400),
        "sound.m4a": b"\0\0\0\x20ftypM4A " + bytes(400),
        "pointer.wav": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "video.wav": wav[:8] + b"AVI " + wav[12:],
        "magic_only.wav": b"RIFF",
        "magic_only.flac": b"fLaC",
        "magic_only.ogg": b"OggS",
        "magic_only.aiff": b"FORM",
    }


def _cut() -> dict[str, bytes]:
    """Downloads that stopped: just before the end, in the middle, right after the header, inside the header."""
    clips = {}
    for name in ("pcm16.wav", "rf64.wav", "flac16.flac", "vorbis.ogg", "opus.opus", "pcm16.aiff"):
        data, (stem, suffix) = good_clips()[name], name.split(".")
        for what, length in {
            "last_byte": len(data) - 1,
            "tail": int(len(data) * 0.97),
            "half": len(data) // 2,
            "most": 300,
            "header": 30,
        }.items():
            clips[f"cut_{what}_{stem}.{suffix}"] = data[:length]
    for name in ("vorbis.ogg", "opus.opus"):
        # Between two pages everything that is left is valid; only the flag on the last page is missing.
        data = good_clips()[name]
        clips[f"cut_between_pages_{name}"] = data[: data.rindex(b"OggS")]
    wav = good_clips()["pcm16.wav"]
    return clips | {"no_data_chunk.wav": wav[:36], "no_format.wav": wav[:12] + wav[36:]}


def _lying() -> dict[str, bytes]:
    """Headers that announce another length or layout than the file has."""
    wav, aiff, flac = (good_clips()[name] for name in ("pcm16.wav", "pcm16.aiff", "flac16.flac"))
    size = len(wav) - 44
    return {
        "says_longer.wav": _with_data_size(wav, 2 * size),
        "says_shorter.wav": _with_data_size(wav, size // 4),
        "says_nothing.wav": _with_data_size(wav, 0),
        "says_64_channels.wav": _patched(wav, 22, "<H", 64),
        "says_stereo.wav": _patched(wav, 22, "<H", 2),
        "says_24_bits.wav": _patched(wav, 34, "<H", 24),
        "says_shorter.aiff": _patched(aiff, aiff.index(b"COMM") + 10, ">I", 1000),
        "says_longer.aiff": _patched(aiff, aiff.index(b"COMM") + 10, ">I", 10**6),
        "says_less_sound.aiff": _patched(aiff, aiff.index(b"SSND") + 4, ">I", 1008),
        "says_longer.flac": with_streaminfo(flac, num_frames=3 * NUM_SAMPLES),
        "says_one_more.flac": with_streaminfo(flac, num_frames=NUM_SAMPLES + 1),
        "says_shorter.flac": with_streaminfo(flac, num_frames=1000),
        "says_one_less.flac": with_streaminfo(flac, num_frames=NUM_SAMPLES - 1),
        "says_no_length.flac": with_streaminfo(flac, num_frames=0),
        "says_other_rate.flac": with_streaminfo(flac, rate=22_050),
    }


def _unbelievable() -> dict[str, bytes]:
    wav, flac, aiff = (good_clips()[name] for name in ("pcm16.wav", "flac16.flac", "pcm16.aiff"))
    rate_at = aiff.index(b"COMM") + 16
    with_nan, with_inf = tone().copy(), tone().copy()
    with_nan[1000], with_inf[1000] = np.nan, -np.inf
    return {
        "rate_0.wav": _patched(wav, 24, "<I", 0),
        "rate_1hz.wav": encode(tone()[:100], 1),
        "rate_1ghz.wav": _patched(wav, 24, "<I", 10**9),
        "rate_1ghz.aiff": aiff[:rate_at] + bytes.fromhex("401cee6b280000000000") + aiff[rate_at + 10 :],
        "rate_0.aiff": aiff[:rate_at] + bytes(10) + aiff[rate_at + 10 :],
        "rate_0.flac": with_streaminfo(flac, rate=0),
        "channels_0.wav": _patched(wav, 22, "<H", 0),
        "channels_64.wav": encode(np.repeat(tone()[:1000, None], 64, axis=1)),
        "no_samples.wav": encode(np.zeros(0)),
        "nan.wav": encode(with_nan, subtype="FLOAT"),
        "inf.wav": encode(with_inf, subtype="FLOAT"),
        "overflows.wav": encode(tone() * np.float32(1e30), subtype="FLOAT"),
    }


def _corrupt() -> dict[str, bytes]:
    """Whole in length, damaged inside."""
    clips = {}
    for name in ("flac16.flac", "vorbis.ogg", "opus.opus"):
        data = good_clips()[name]
        for place in (0.4, 0.7, 0.97):
            at = int(len(data) * place)
            clips[f"changed_at_{place}_{name}"] = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        middle = len(data) // 2
        clips[f"hole_{name}"] = data[:middle] + data[middle + 3000 :]
        clips[f"blank_{name}"] = data[:middle] + bytes(2000) + data[middle + 2000 :]
        clips[f"junk_before_{name}"] = b"junk" * 3 + data
    pages = _ogg_pages(good_clips()["vorbis.ogg"])
    clips["page_missing.ogg"] = b"".join(pages[:-2] + pages[-1:])
    clips["two_streams.ogg"] = good_clips()["vorbis.ogg"] + encode(tone(), 22_050, "OGG", "VORBIS")
    return clips


def _ogg_pages(data: bytes) -> list[bytes]:
    pages = []
    while data:
        count = data[26]
        length = 27 + count + sum(data[27 : 27 + count])
        pages.append(data[:length])
        data = data[length:]
    return pages


def _patched(data: bytes, at: int, kind: str, value: int) -> bytes:
    return data[:at] + struct.pack(kind, value) + data[at + struct.calcsize(kind) :]


def _with_data_size(wav: bytes, size: int, riff_size: int | None = None) -> bytes:
    wav = _patched(wav, 40, "<I", size)
    return wav if riff_size is None else _patched(wav, 4, "<I", riff_size)


def with_streaminfo(flac: bytes, *, num_frames: int | None = None, rate: int | None = None) -> bytes:
    """A FLAC file whose header announces something else."""
    packed = int.from_bytes(flac[18:26], "big")
    if num_frames is not None:
        packed = packed >> 36 << 36 | num_frames
    if rate is not None:
        packed = packed & (1 << 44) - 1 | rate << 44
    return flac[:18] + packed.to_bytes(8, "big") + flac[26:]
