"""Any file to mono samples: formats told by content, segments, blocks, resampling in blocks, and what is refused."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import damaged_audio
import ffmpeg_audio
import numpy as np
import pytest
import soundfile

import fastsskd_kernels as kernels
from fastsskd import clip_file
from fastsskd.audio import any_format as any_audio
from fastsskd.audio import ffmpeg as audio_ffmpeg
from fastsskd.audio import ffmpeg_process
from fastsskd.audio.any_format import AnyAudio, resampled
from fastsskd.audio.info import BadClip


@pytest.fixture
def opened(tmp_path):
    """A function that opens a file's bytes; its name tells nothing."""

    def open_bytes(data: bytes) -> AnyAudio:
        (tmp_path / "clip").write_bytes(data)
        return AnyAudio(tmp_path / "clip")

    return open_bytes


def whole(audio, *segment):
    return np.concatenate(list(audio.blocks(*segment)))


def shift_and_likeness(samples, expected, rate):
    """By how many samples a piece of the sound comes late, and how alike it is there: 1 = the same but for volume."""
    begin, end = round(0.2 * rate), round(0.7 * rate)
    piece = expected[begin:end]
    place = int(np.argmax(np.abs(np.correlate(samples[: round(0.9 * rate)], piece, "valid"))))
    found = samples[place : place + len(piece)]
    return place - begin, abs(float(found @ piece)) / np.linalg.norm(found) / np.linalg.norm(piece)


# ----------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", damaged_audio.good_clips())
def test_good_files_come_out_as_soundfile_reads_them(name, opened):
    data = damaged_audio.good_clips()[name]
    audio = opened(data)
    expected, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    assert audio.rate == rate and audio.info.channels == expected.shape[1]
    np.testing.assert_allclose(whole(audio), expected.mean(axis=1), rtol=1e-5, atol=1e-7)
    if expected.shape[1] == 1:
        np.testing.assert_array_equal(whole(audio), expected[:, 0])


@pytest.mark.parametrize("name", damaged_audio.bad_clips())
def test_bad_files_are_refused_with_a_reason(name, opened):
    with pytest.raises(BadClip) as error:
        whole(opened(damaged_audio.bad_clips()[name]))
    reason = str(error.value)
    assert reason and "\n" not in reason and "pack` first" not in reason


UNALIGNED = ("layer2.mp2", "adts.aac", "wma.wma", "amr.amr", "mp3_in.wav", "mp3.avi")


@pytest.mark.parametrize("name", ffmpeg_audio.FORMATS)
def test_other_formats_hold_the_sound_that_went_in(name, opened):
    _, codec, rate, channels, _ = ffmpeg_audio.FORMATS[name]
    audio = opened(ffmpeg_audio.clip(name))
    samples = whole(audio)
    assert (audio.rate, audio.info.channels) == (rate, channels)
    assert len(samples) / rate == pytest.approx(ffmpeg_audio.SECONDS, abs=0.1)
    expected = ffmpeg_audio.tone(rate)
    shift, likeness = shift_and_likeness(samples, expected, rate)
    # Some containers have no room for how many samples the encoder put before the sound.
    assert abs(shift) < 0.06 * rate if name in UNALIGNED else shift == 0
    assert likeness > 0.95 and np.std(samples) == pytest.approx(np.std(expected), rel=0.1)
    if codec.startswith("pcm") or codec in ("flac", "alac"):
        np.testing.assert_allclose(samples, expected, atol=1e-4)


@pytest.mark.parametrize("how", ["cut in the middle", "cut near the end", "hole", "blank"])
@pytest.mark.parametrize("name", ffmpeg_audio.FORMATS)
def test_damage_in_other_formats_is_found(name, how, opened):
    if (name, how) in [("pcm.au", "hole"), ("pcm.au", "blank"), ("pcm.caf", "blank"), ("pcm.w64", "blank")]:
        pytest.skip("nothing in the file tells")
    data = ffmpeg_audio.damaged(ffmpeg_audio.clip(name, 4.0), how)
    with pytest.raises(BadClip) as error:
        whole(opened(data))
    assert "\n" not in str(error.value)


def test_sound_that_is_not_there_or_not_known(opened):
    pytest.importorskip("av")
    with pytest.raises(BadClip, match="no sound in it"):
        opened(ffmpeg_audio.write("mp4", "aac", 44_100, 1, True, sound=False))
    mp4 = ffmpeg_audio.clip("aac.m4a")
    with pytest.raises(BadClip, match=r"before its index \(moov\)"):
        opened(mp4[: mp4.rindex(b"moov") - 4])
    with pytest.raises(BadClip, match="unknown header 01 02"):
        opened(bytes(range(1, 255)) * 100)


def test_without_ffmpeg_the_reason_says_what_to_install(opened, monkeypatch):
    files = [ffmpeg_audio.clip(name) for name in ("aac.m4a", "opus.webm", "amr.amr", "mp3.mp3")]
    monkeypatch.setattr(audio_ffmpeg, "is_installed", lambda: False)
    for data, name in zip(files, ("MP4 or M4A", "WebM or Matroska", "AMR"), strict=False):
        with pytest.raises(BadClip) as error:
            opened(data)
        assert str(error.value) == f"{name}: to read it, `pip install 'fastsskd[formats]'`"
    assert len(whole(opened(files[3]))) == 2 * 44_100  # MP3 needs no FFmpeg


# --------------------------------------------------------------------------------------------------------------- MP3


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 24000, 32000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_is_as_long_as_it_went_in(rate, channels, opened):
    pytest.importorskip("av")
    audio = opened(ffmpeg_audio.write("mp3", "libmp3lame", rate, channels, False, seconds=0.7))
    assert len(whole(audio)) == audio.info.num_frames == round(0.7 * rate)


def test_mp3_without_a_number_of_frames(opened):
    pytest.importorskip("av")
    bare = ffmpeg_audio.write("mp3", "libmp3lame", 44_100, 1, False, write_xing="0", id3v2_version="0")
    audio = opened(bare)
    assert len(whole(audio)) == audio.info.num_frames and audio.info.num_frames % 1152 == 0
    assert len(whole(opened(bare + b"TAG" + bytes(125)))) == audio.info.num_frames
    for padding in (0, 1000):
        assert len(whole(opened(b"ID3\4\0\0\0\0\0\x0a" + bytes(10 + padding) + bare))) == audio.info.num_frames
    for data, says in {bare[:-1]: "cut short", bare[: len(bare) // 2] + bytes(9000): "no MPEG frame"}.items():
        with pytest.raises(BadClip, match=says):
            opened(data)


def test_mp3_that_says_how_many_frames_it_has(opened):
    data = ffmpeg_audio.clip("mp3.mp3")
    assert len(whole(opened(data + b"junk" * 9))) == 2 * 44_100
    for other, says in {
        data[:-1]: "truncated: 77 of 78 MPEG frames",
        data[:5000] + data[6000:]: "damaged",
        data + data: "several MP3 files in one",
        data + data[-3 * 418 :]: "header lies",
    }.items():
        with pytest.raises(BadClip, match=says):
            opened(other)


# ---------------------------------------------------------------------------------------------------------- segments

SEGMENTED = {
    "pcm16.wav": damaged_audio.good_clips,
    "flac24_stereo.flac": damaged_audio.good_clips,
    "pcm16.aiff": damaged_audio.good_clips,
    "vorbis.ogg": damaged_audio.good_clips,
    "adpcm.wav": damaged_audio.good_clips,
    "mp3.mp3": None,
    "aac.m4a": None,
    "video.webm": None,
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", SEGMENTED)
def test_segments_are_slices_in_any_order_and_blocks_of_any_size(name, in_memory, opened, monkeypatch):
    data = damaged_audio.good_clips()[name] if SEGMENTED[name] else ffmpeg_audio.clip(name)
    expected = whole(opened(data))
    monkeypatch.setattr(any_audio, "BLOCK", 5000)
    if not in_memory:
        monkeypatch.setattr(clip_file, "IN_MEMORY", 1000)
    audio = opened(data)
    rate = audio.rate
    for start, end in [(0.0, 0.5), (0.5, 1.0), (0.7, 0.9), (1.5, 9.0), (0.1, 0.2), (0.25, -1.0), (0.0, -1.0)]:
        stop = len(expected) if end < 0 else round(end * rate)
        np.testing.assert_array_equal(whole(audio, start, end), expected[round(start * rate) : stop])
    for _ in range(2):
        with pytest.raises(BadClip, match="is over before its segment begins, at 7 s"):
            whole(audio, 7.0, 8.0)
    np.testing.assert_array_equal(whole(audio, 1.0, 1.5), expected[rate : round(1.5 * rate)])


def test_a_segment_costs_no_more_than_itself_where_the_format_allows_it(opened, monkeypatch):
    counted = []
    read = any_audio._SoundfileReader.read
    monkeypatch.setattr(any_audio._SoundfileReader, "read", lambda self, n: counted.append(n) or read(self, n))
    audio = opened(damaged_audio.good_clips()["flac16.flac"])
    whole(audio, 1.0, 1.25)
    whole(audio, 0.5, 0.75)
    assert sum(counted) == round(0.25 * 44_100) * 2


def test_segments_in_order_decode_a_file_once(opened, monkeypatch):
    data = ffmpeg_audio.clip("opus.webm")
    opens = []
    first = ffmpeg_process.RemoteReader.__init__
    monkeypatch.setattr(ffmpeg_process.RemoteReader, "__init__", lambda self, *a: opens.append(1) or first(self, *a))
    audio = opened(data)
    for number in range(10):
        assert len(whole(audio, number / 10, (number + 1) / 10)) == 4800
    assert len(opens) == 1


def test_sound_behind_damage_is_refused_and_sound_before_it_is_not(opened):
    data = bytearray(ffmpeg_audio.clip("flac.mkv", 4.0))
    data[int(len(data) * 0.6)] ^= 0x55
    audio, alone = opened(bytes(data)), []
    before = whole(audio, 0.0, 1.0)
    for segment in [(2.0, 4.0), (3.0, 3.5), (0.0, -1.0)]:
        with pytest.raises(BadClip) as error:
            whole(audio, *segment)
        with pytest.raises(BadClip) as fresh:
            whole(opened(bytes(data)), *segment)
        assert str(error.value) == str(fresh.value)  # whatever was read before
        alone.append(str(error.value))
    np.testing.assert_array_equal(whole(audio, 0.0, 1.0), before)
    assert len(set(alone)) == 1


def test_a_crash_of_ffmpeg_takes_one_clip_with_it(opened):
    data = ffmpeg_audio.clip("opus.webm")
    expected, audio = whole(opened(data)), opened(data)
    with pytest.raises(BadClip, match=r"FFmpeg crashed on it \(Segmentation fault\)"):
        process = audio._reader._process
        os.kill(process._process.pid, signal.SIGSEGV)
        whole(audio)
    np.testing.assert_array_equal(whole(opened(data)), expected)


def test_no_process_is_left_when_its_thread_has_ended(opened):
    data, pids = ffmpeg_audio.clip("opus.webm"), []

    def work():
        audio = opened(data)
        pids.append(audio._reader._process._process.pid)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_no_process_is_left_after_a_kill(tmp_path):
    (tmp_path / "clip").write_bytes(ffmpeg_audio.clip("opus.webm"))
    code = (
        "import os, sys; from fastsskd.audio.ffmpeg_process import RemoteReader;"
        "reader = RemoteReader(sys.argv[1], 0, -1);"
        "print(reader._process._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "clip"], capture_output=True, text=True, timeout=60)
    assert killed.returncode == -9
    status, end = Path(f"/proc/{int(killed.stdout)}/status"), time.monotonic() + 30
    while status.exists() and "State:\tZ" not in status.read_text():  # a zombie waits for its new parent only
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_clip_inside_of_another_file(tmp_path):
    wav = damaged_audio.good_clips()["pcm16.wav"]
    path = tmp_path / "shard.tar"
    path.write_bytes(bytes(512) + wav + bytes(100))
    expected, _ = soundfile.read(io.BytesIO(wav), dtype="float32")
    np.testing.assert_array_equal(whole(AnyAudio(path, 512, len(wav))), expected)
    with pytest.raises(BadClip, match="ends 412 bytes before the clip does"):
        AnyAudio(path, 1024, len(wav))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_file, "IN_MEMORY", 1000)
    monkeypatch.setattr(any_audio, "BLOCK", 5000)
    path = tmp_path / "clip.wav"
    path.write_bytes(damaged_audio.good_clips()["pcm16.wav"])
    blocks = AnyAudio(path).blocks()
    next(blocks)
    os.truncate(path, 50_000)
    with pytest.raises(BadClip, match="cannot be read"):
        list(blocks)


# --------------------------------------------------------------------------------------------------------- resampling


@pytest.mark.parametrize("rate", [1000, 8000, 11025, 16000, 22050, 44100, 44101, 48000, 96000, 192001, 384000])
def test_resampling_in_blocks_is_resampling_at_once(rate):
    random = np.random.default_rng(rate)
    for length in (1, 100, 70_000, 100_000 if rate == 1000 else 900_000):
        clip = random.standard_normal(length).astype(np.float32)
        cuts = np.sort(random.integers(0, length, 6)) if length > 100 else []
        blocks = [block for block in np.split(clip, cuts) if len(block)]
        _, up, down = kernels.resample_table(rate)
        expected = kernels.resample_crop_or_loop(clip, rate, kernels.resampled_length(length, up, down))
        parts = list(resampled(iter(blocks), rate))
        np.testing.assert_array_equal(np.concatenate(parts), expected)
        if length == 900_000 and down < 1000 and rate != 1000:
            assert len(parts) > 3, "the blocks must not wait for each other"
