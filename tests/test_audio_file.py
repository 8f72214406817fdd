"""Every good file passes, every bad one is found: before decoding, by the decoder, or by its length after it."""

import glob
import mmap
from pathlib import Path

import damaged_audio
import numpy as np
import pytest
import soundfile

from fastsskd.audio.file import AudioInfo, BadClip, check_decoded, check_decoded_length, probe

ESC10 = Path(__file__).parents[2] / "shared/data/esc10"
GOOD, BAD = damaged_audio.good_clips(), damaged_audio.bad_clips()
# Found only by decoding: DALI reports them (FLAC's frame checksums), or their samples tell.
LEFT_TO_DECODER = {
    *(f"changed_at_{place}_flac16.flac" for place in (0.4, 0.7, 0.97)),
    "hole_flac16.flac",
    "blank_flac16.flac",
    "cut_last_byte_flac16.flac",
    "nan.wav",
    "inf.wav",
    "overflows.wav",
}


class DaliDecoder:
    """DALI's audio decoder for one clip at a time; an error means a new pipeline."""

    def __init__(self, sample_rate: int | None = None):
        self._resample = {} if sample_rate is None else {"sample_rate": sample_rate}
        self._pipeline = None

    def __call__(self, data: bytes) -> np.ndarray | None:
        """(S,) mono samples; None: DALI reported an error."""
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def decode():
            encoded = fn.external_source(source=lambda: [self._data], dtype=types.UINT8, ndim=1)
            return fn.decoders.audio(encoded, downmix=True, dtype=types.FLOAT, **self._resample)[0]

        if self._pipeline is None:
            self._pipeline = decode()
            self._pipeline.build()
        self._data = np.frombuffer(data, np.uint8)
        try:
            return np.array(self._pipeline.run()[0][0])
        except RuntimeError:
            self._pipeline = None
            return None


@pytest.fixture(scope="module")
def dali():
    pytest.importorskip("nvidia.dali")
    return DaliDecoder()


def verdict(data: bytes, decoder) -> str:
    """What happens to a clip in the loader: "" = used, else who found the damage."""
    try:
        info = probe(data)
    except BadClip as bad:
        assert str(bad) and "\n" not in str(bad)
        return "probe"
    waveform = decoder(data)
    if waveform is None:
        return "decoder"
    rate = soundfile_rate(data) if info.format == "opus" else info.sample_rate
    try:
        check_decoded(waveform, info, rate)
    except BadClip:
        return "check_decoded"
    return ""


def soundfile_rate(data: bytes) -> int:
    """Opus is decoded at the rate its header recommends."""
    return int.from_bytes(data[data.index(b"OpusHead") + 12 :][:4], "little")


@pytest.mark.parametrize("name", GOOD)
def test_good_clips_are_used(name, dali, tmp_path):
    assert verdict(GOOD[name], dali) == ""
    (tmp_path / name).write_bytes(GOOD[name])
    truth, info = soundfile.info(tmp_path / name), probe(GOOD[name])
    assert info.channels == truth.channels
    assert info.sample_rate == (48_000 if info.format == "opus" else truth.samplerate)
    if info.num_frames is not None:
        assert info.num_frames * truth.samplerate == truth.frames * info.sample_rate


@pytest.mark.parametrize("name", BAD)
def test_bad_clips_are_found(name, dali):
    found_by = verdict(BAD[name], dali)
    assert found_by in (("decoder", "check_decoded") if name in LEFT_TO_DECODER else ("probe",))


def test_dali_is_silent_about_what_the_docstring_says(dali):
    """Should a DALI version begin to report these, the table and perhaps the checks can shrink."""
    silent = "cut_half_pcm16.wav cut_tail_vorbis.ogg cut_tail_opus.opus cut_half_pcm16.aiff says_shorter.wav "
    silent += "says_24_bits.wav says_shorter.flac says_other_rate.flac says_shorter.aiff rate_1ghz.wav channels_64.wav "
    silent += (
        "changed_at_0.97_vorbis.ogg changed_at_0.97_opus.opus cut_between_pages_vorbis.ogg two_streams.ogg nan.wav"
    )
    assert [name for name in silent.split() if dali(BAD[name]) is None] == []
    loud = [
        "empty.wav",
        "text.flac",
        "cut_half_flac16.flac",
        "changed_at_0.4_flac16.flac",
        "rate_0.wav",
        "hole_vorbis.ogg",
    ]
    assert [name for name in loud if dali(BAD[name]) is not None] == []


@pytest.mark.parametrize("name", ["pcm16.wav", "vorbis.ogg", "opus.opus", "pcm16.aiff", "float.aifc", "rf64.wav"])
def test_a_cut_at_any_length_is_found(name):
    data = GOOD[name]
    lengths = {*range(200), *np.linspace(0, len(data) - 1, 400).astype(int), *range(len(data) - 50, len(data))}
    for length in lengths:
        with pytest.raises(BadClip):
            probe(data[:length])


def test_a_flac_cut_at_any_length_is_found_or_left_to_dali(dali):
    data = GOOD["flac16.flac"]
    for length in {*range(0, 120, 7), *np.linspace(0, len(data) - 1, 60).astype(int)}:
        assert verdict(data[:length], dali) in ("probe", "decoder")


@pytest.mark.skipif(not ESC10.exists(), reason="ESC-10 is not here")
def test_real_ogg_files_pass_and_their_cuts_do_not():
    rng = np.random.default_rng(0)
    files = sorted(glob.glob(str(ESC10 / "audio/*.ogg")))[::5]
    for path in files:
        data = Path(path).read_bytes()
        assert probe(data).num_frames == soundfile.info(path).frames
        last_page = data.rindex(b"OggS")
        for length in (*rng.integers(0, len(data), 20), last_page, last_page + 27, len(data) - 1):
            with pytest.raises(BadClip):
                probe(data[:length])


@pytest.mark.parametrize("name", ["pcm16.wav", "rf64.wav", "flac16.flac", "vorbis.ogg", "opus.opus", "float.aifc"])
def test_random_damage_never_raises_anything_else(name):
    rng = np.random.default_rng(1)
    for _ in range(300):
        data = bytearray(GOOD[name][: rng.integers(1, 3000)])
        for at in rng.integers(0, min(len(data), 120), rng.integers(1, 6)):
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        try:
            probe(data)
        except BadClip as bad:
            assert "\n" not in str(bad)


def test_reads_memory_maps_and_lets_go_of_them(tmp_path):
    for name, fails in (("pcm16.wav", False), ("says_shorter.wav", True), ("vorbis.ogg", False)):
        (tmp_path / name).write_bytes((BAD if fails else GOOD)[name])
        with open(tmp_path / name, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            probe(mapped)
        except BadClip:
            assert fails
            mapped.close()  # a BufferError here means that a view is kept
        else:
            assert not fails
            mapped.close()
    assert probe(memoryview(np.frombuffer(GOOD["pcm16.wav"], np.uint8))) == probe(GOOD["pcm16.wav"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty.wav", "empty file"),
        ("text.flac", "text"),
        ("page.ogg", "web page"),
        ("json.wav", "text"),
        ("song.mp3", "pack"),
        ("sound.m4a", "pack"),
        ("video.webm", "pack"),
        ("pointer.wav", "Git LFS"),
        ("zeros.wav", "zeros"),
        ("noise.wav", "unknown header"),
        ("cut_half_pcm16.wav", "truncated"),
        ("cut_between_pages_vorbis.ogg", "truncated"),
        ("cut_half_flac16.flac", "truncated"),
        ("says_shorter.wav", "lies"),
        ("says_shorter.flac", "lies"),
        ("says_other_rate.flac", "22050"),
        ("rate_1ghz.wav", "1000000000 Hz"),
        ("channels_64.wav", "64 channels"),
        ("no_samples.wav", "no samples"),
        ("changed_at_0.97_opus.opus", "checksum"),
        ("page_missing.ogg", "missing"),
    ],
)
def test_reasons_name_the_cause(name, says):
    with pytest.raises(BadClip, match=says):
        probe(BAD[name])


def test_flac_rates_and_sizes_outside_the_code_tables(tmp_path):
    for rate in (11_025, 12_345, 37_000, 768_000 // 2, 96_000, 1_000):
        for size in (1, 16, 255, 4096, 4097, 10_000):
            data = damaged_audio.encode(damaged_audio.tone()[:size], rate, "FLAC")
            assert probe(data) == AudioInfo("flac", rate, 1, size)


def test_resampled_lengths(dali):
    resampling = DaliDecoder(16_000)
    for name in ("pcm16.wav", "vorbis.ogg", "opus.opus", "opus_16k.opus", "rate_384khz.wav", "one_sample.flac"):
        check_decoded(resampling(GOOD[name]), probe(GOOD[name]), 16_000)


def test_check_decoded():
    info = AudioInfo("flac", 8_000, 1, 800)
    good = np.zeros(800, np.float32)
    check_decoded(good, info)
    check_decoded(np.zeros(1600, np.float32), info, 16_000)
    check_decoded(np.zeros(123, np.float32), AudioInfo("wav", 8_000, 1, None))
    for num_samples in (0, 797, 803, 400, 1600):
        with pytest.raises(BadClip):
            check_decoded_length(num_samples, info)
    for value in (np.nan, np.inf, -np.inf, 1e30):
        wrong = good.copy()
        wrong[5] = value
        with pytest.raises(BadClip):
            check_decoded(wrong, info)


def test_info_in_seconds():
    assert AudioInfo("wav", 8_000, 1, 4_000).seconds == 0.5
    assert AudioInfo("wav", 8_000, 1, None).seconds is None
