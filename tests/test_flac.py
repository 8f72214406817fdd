"""FLAC frames -> samples, against libsndfile; streams that its encoder never writes come from a small one here."""

import io

import numpy as np
import pytest
import soundfile

import fastsskd_kernels as kernels
from fastsskd.audio.flac import flac_extent, flac_stream

RATE = 16000
RNG = np.random.default_rng(0)
T = np.arange(20000) / RATE
SOUNDS = {
    "noise": 0.3 * RNG.standard_normal(20000),
    "tones": 0.5 * np.sin(2 * np.pi * 440 * T) + 0.3 * np.sin(2 * np.pi * 3001 * T),
    "silence": np.zeros(20000),
    "constant": np.full(20000, -0.25),
    "full scale": np.sign(np.sin(2 * np.pi * 100 * T)),
    "clicks": np.where(np.arange(20000) % 997 == 0, 0.99, 0.0),
    "soft noise": 1e-4 * RNG.standard_normal(20000),
    "loud then soft": RNG.standard_normal(20000) * np.where(T < 0.6, 0.3, 1e-3),
}


def encode(samples, subtype="PCM_16", level=0.5):
    file = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(file, "w", RATE, channels, subtype, format="FLAC", compression_level=level) as out:
        out.write(samples)
    return file.getvalue()


def decode(data, begin=0, end=None):
    stream = flac_stream(data)
    frames = np.frombuffer(data[stream.first_frame :] + bytes(kernels.FLAC_PADDING), np.uint8)
    kind = {"channels": stream.info.channels, "sample_bits": stream.sample_bits, "block_size": stream.block_size}
    return kernels.decode_flac(frames, **kind, begin=begin, end=end or stream.info.num_frames)


def truth(data):
    """The channels' mean in float64."""
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float64", always_2d=True)
    return samples.mean(1)


def same(found, expected):
    if found.dtype == np.int16:
        np.testing.assert_array_equal(found, expected * 32768)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("sound", SOUNDS)
def test_mono(sound, subtype, level):
    data = encode(np.clip(SOUNDS[sound], -1, 1), subtype, level)
    found = decode(data)
    assert found.dtype == (np.float32 if subtype == "PCM_24" else np.int16)
    same(found, truth(data))


@pytest.mark.parametrize("level", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("channels", [2, 3, 8])
def test_channels_are_averaged(channels, subtype, level):
    base = np.clip(SOUNDS["tones"] + SOUNDS["soft noise"], -1, 1)
    for difference in (0.0, 1e-3, 0.3):  # which decides how an encoder stores two channels
        samples = base[:, None] + difference * RNG.standard_normal((len(base), channels))
        data = encode(np.clip(samples, -1, 1), subtype, level)
        same(decode(data), truth(data))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 1151, 1152, 1153, 4095, 4096, 4097, 12289])
def test_lengths(length):
    for level in (0.0, 0.5):
        data = encode(SOUNDS["noise"][:length], level=level)
        same(decode(data), truth(data))


def test_a_range_of_it():
    data = encode(SOUNDS["loud then soft"])
    whole = decode(data)
    for begin, end in ((0, 1), (0, 4096), (4095, 4097), (4096, 8192), (5000, 19999), (19999, 20000), (100, 100 + 4096)):
        np.testing.assert_array_equal(decode(data, begin, end), whole[begin:end])


def test_more_than_there_is():
    with pytest.raises(ValueError, match="ends inside a frame"):
        decode(encode(SOUNDS["noise"]), 0, 20001)


def test_whatever_the_bytes_it_gives_the_samples_or_a_reason():
    rng = np.random.default_rng(1)
    for sound in ("noise", "tones", "clicks"):
        data = encode(SOUNDS[sound][:9000], level=0.25)
        stream, expected = flac_stream(data), decode(data)
        kind = {"channels": 1, "sample_bits": 16, "block_size": stream.block_size, "begin": 0, "end": 9000}
        refused = 0
        for _ in range(400):
            changed = np.frombuffer(data[stream.first_frame :] + bytes(8), np.uint8).copy()
            kind_of_damage = rng.integers(4)
            if kind_of_damage == 0:
                changed[rng.integers(len(changed) - 8)] ^= 1 << rng.integers(8)
            elif kind_of_damage == 1:
                at = rng.integers(len(changed) - 8)
                changed[at : at + 40] = rng.integers(0, 256, len(changed[at : at + 40]))
            elif kind_of_damage == 2:
                changed = changed[: 8 + rng.integers(len(changed) - 8)]
            else:
                changed = np.delete(changed, rng.integers(len(changed) - 8))
            try:
                np.testing.assert_array_equal(kernels.decode_flac(changed, **kind), expected)
            except ValueError:
                refused += 1
        assert refused > 390  # some bytes say what others say as well


def test_random_bytes():
    rng = np.random.default_rng(2)
    for _ in range(300):
        data = rng.integers(0, 256, rng.integers(8, 600), dtype=np.uint8)
        data[:2] = 0xFF, 0xF8
        with pytest.raises(ValueError):
            kernels.decode_flac(data, channels=1, sample_bits=16, block_size=4096, begin=0, end=5000)


def test_a_missing_frame_is_noticed():
    data = encode(SOUNDS["noise"])
    first = flac_stream(data).first_frame
    starts = [first + i for i in range(len(data) - first) if data[first + i : first + i + 3] == data[first : first + 3]]
    with pytest.raises(ValueError, match="missing"):
        decode(data[: starts[1]] + data[starts[2] :])


@pytest.mark.parametrize(
    "changes", [{"channels": 9}, {"sample_bits": 32}, {"block_size": 0}, {"begin": 5, "end": 5}, {"begin": -1}]
)
def test_what_is_not_read(changes):
    kind = {"channels": 1, "sample_bits": 16, "block_size": 4096, "begin": 0, "end": 10} | changes
    with pytest.raises(ValueError, match="not read here"):
        kernels.decode_flac(np.zeros(100, np.uint8), **kind)


@pytest.mark.parametrize("data", [np.zeros(7, np.uint8), np.zeros((2, 50), np.uint8), np.zeros(100, np.int8)])
def test_arrays_that_are_not_bytes(data):
    with pytest.raises(ValueError, match="uint8"):
        kernels.decode_flac(data, channels=1, sample_bits=16, block_size=4096, begin=0, end=10)


class Bits:
    """Bits written one after the other."""

    def __init__(self):
        self.text = ""

    def put(self, value, count):
        if count:
            self.text += format(int(value) & (1 << count) - 1, f"0{count}b")

    def data(self):
        padded = self.text + "0" * (-len(self.text) % 8)
        return int(padded, 2).to_bytes(len(padded) // 8, "big")


def crc(data, polynomial, width):
    """Bit by bit."""
    value = 0
    for byte in data:
        value ^= byte << width - 8
        for _ in range(8):
            value = (value << 1) ^ (polynomial if value >> width - 1 else 0)
            value &= (1 << width) - 1
    return value


def utf8(number):
    """FLAC's form of UTF-8, for numbers of up to 36 bits."""
    if number < 0x80:
        return bytes([number])
    extra = next(n for n in range(1, 7) if number < 1 << (6 * n + (6 - n if n < 6 else 0)))
    lead = (0xFF << 7 - extra) & 0xFF
    rest = [0x80 | number >> 6 * i & 0x3F for i in reversed(range(extra))]
    return bytes([lead | number >> 6 * extra, *rest])


def rice(bits, value, k):
    code = 2 * value if value >= 0 else -2 * value - 1
    bits.put(1, (code >> k) + 1)
    bits.put(code, k)


def subframe(bits, samples, depth, plan):
    """``plan``: kind ("verbatim", "fixed", "lpc"), order, wasted bits, log2 of the parts, Rice method, escapes."""
    wasted, order = plan.get("wasted", 0), plan.get("order", 0)
    kinds = {"verbatim": 1, "fixed": 8 + order, "lpc": 31 + order}
    bits.put(kinds[plan["kind"]] << 1 | bool(wasted), 8)
    if wasted:
        bits.put(1, wasted)
    samples, depth = [int(sample) >> wasted for sample in samples], depth - wasted
    for sample in samples if plan["kind"] == "verbatim" else samples[:order]:
        bits.put(sample, depth)
    if plan["kind"] == "verbatim":
        return
    if plan["kind"] == "lpc":
        coefficients, shift, precision = plan["coefficients"], plan["shift"], plan["precision"]
        bits.put(precision - 1, 4)
        bits.put(shift, 5)
        for coefficient in coefficients:
            bits.put(coefficient, precision)
    else:
        coefficients = {0: [], 1: [1], 2: [2, -1], 3: [3, -3, 1], 4: [4, -6, 4, -1]}[order]
        shift = 0
    residual = [
        samples[i] - (sum(c * samples[i - 1 - j] for j, c in enumerate(coefficients)) >> shift)
        for i in range(order, len(samples))
    ]
    method, parts, at = plan.get("method", 0), 1 << plan.get("log_parts", 0), 0
    bits.put(method, 2)
    bits.put(plan.get("log_parts", 0), 4)
    for part in range(parts):
        count = len(samples) // parts - (order if part == 0 else 0)
        values = residual[at : at + count]
        at += count
        if part in plan.get("escapes", ()):
            width = max([0, *(value.bit_length() + 1 for value in values if value)])
            bits.put((1 << 4 + method) - 1, 4 + method)
            bits.put(width, 5)
            for value in values:
                bits.put(value, width)
        else:
            k = plan.get("k", 8)
            bits.put(k, 4 + method)
            for value in values:
                rice(bits, value, k)


def frame(samples, first, depth, plan, *, numbered=None, rate_code=5):
    """A mono frame; ``numbered``: its frame number, None = numbered by samples."""
    header = Bits()
    header.put(0x7FFC << 1 | (numbered is None), 16)
    header.put(7, 4)  # 16 bits of size follow
    header.put(rate_code, 4)
    header.put(0, 4)
    header.put({8: 1, 12: 2, 16: 4, 20: 5, 24: 6}[depth], 3)
    header.put(0, 1)
    head = header.data() + utf8(first if numbered is None else numbered) + (len(samples) - 1).to_bytes(2, "big")
    head += {12: b"\x10", 13: b"\x3e\x80", 14: b"\x06\x40", 5: b""}[rate_code]
    head += bytes([crc(head, 0x07, 8)])
    body = Bits()
    subframe(body, samples, depth, plan)
    data = head + body.data()
    return data + crc(data, 0x8005, 16).to_bytes(2, "big")


def stream(frames, length, depth, smallest, largest):
    info = smallest.to_bytes(2, "big") + largest.to_bytes(2, "big") + bytes(6)
    info += (RATE << 44 | (depth - 1) << 36 | length).to_bytes(8, "big") + bytes(16)
    return b"fLaC\x80\x00\x00\x22" + info + b"".join(frames)


def smooth(length, depth, seed):
    walk = np.cumsum(np.random.default_rng(seed).standard_normal(length))
    return np.round(walk / np.abs(walk).max() * 0.9 * 2 ** (depth - 1)).astype(np.int64)


def lpc(order, seed, shift=10):
    """Coefficients that predict badly, which a decoder must not mind."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-120, 120, order)
    values[0] += 900
    return {"kind": "lpc", "order": order, "coefficients": values.tolist(), "shift": shift, "precision": 12}


PLANS = {
    **{f"order {n}": lpc(n, n) for n in (1, 4, 5, 8, 9, 12, 13, 31, 32)},
    **{f"fixed {n}": {"kind": "fixed", "order": n, "log_parts": 3} for n in range(5)},
    "verbatim": {"kind": "verbatim"},
    "no shift": lpc(3, 1, shift=0) | {"coefficients": [2, -1, 0], "precision": 3},
    "escapes": {"kind": "fixed", "order": 2, "log_parts": 3, "escapes": (0, 3, 7)},
    "5 bits of parameter": {"kind": "fixed", "order": 0, "method": 1, "k": 17},
    "5 bits, escapes": {"kind": "fixed", "order": 1, "method": 1, "k": 3, "log_parts": 2, "escapes": (1,)},
    "no bits of remainder": {"kind": "fixed", "order": 1, "k": 0},
    "wasted bits": {"kind": "fixed", "order": 2, "wasted": 3},
    "many parts": lpc(4, 4) | {"log_parts": 6},
}


@pytest.mark.parametrize("depth", [8, 12, 16, 20, 24])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_streams_that_encoders_seldom_write(plan, depth):
    size = 640 if depth < 20 else 320
    samples = smooth(3 * size, depth, 5) >> (0 if depth < 20 else depth - 14)  # or runs of zeros take for ever
    samples = samples >> plan.get("wasted", 0) << plan.get("wasted", 0)
    parts = [samples[i * size : (i + 1) * size] for i in range(3)]
    data = stream(
        [frame(part, 0, depth, plan, numbered=i) for i, part in enumerate(parts)], 3 * size, depth, size, size
    )
    if depth in (8, 16, 24):  # which are all that libsndfile knows: it understands what this encoder writes
        assert np.array_equal(np.round(truth(data) * 2 ** (depth - 1)), samples)
    same(decode(data), samples / 2 ** (depth - 1))


@pytest.mark.parametrize("rate_code", [5, 12, 13, 14])
def test_frames_of_many_sizes_numbered_by_samples(rate_code):
    sizes = [500, 16, 4000, 1, 777, 64]
    samples, frames, at = smooth(sum(sizes), 16, 7), [], 0
    for size in sizes:
        plan = {"kind": "verbatim"} if size < 4 else {"kind": "fixed", "order": 2}
        frames.append(frame(samples[at : at + size], at, 16, plan, rate_code=rate_code))
        at += size
    data = stream(frames, len(samples), 16, 16, 4000)
    assert np.array_equal(np.round(truth(data) * 2**15), samples)
    np.testing.assert_array_equal(decode(data), samples)


def test_numbers_of_every_length():
    for number in (0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, 0x1FFFFF, 0x200000, 0x3FFFFFF, 0x4000000, 0x7FFFFFFF):
        samples = smooth(64, 16, number % 1000)
        data = frame(samples, number, 16, {"kind": "fixed", "order": 2}) + bytes(8)
        kind = {"channels": 1, "sample_bits": 16, "block_size": 64}
        found = kernels.decode_flac(np.frombuffer(data, np.uint8), **kind, begin=number, end=number + 64)
        np.testing.assert_array_equal(found, samples)


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_part_of_a_long_file(level):
    rng = np.random.default_rng(3)
    samples = (rng.standard_normal(400_000) * 3000 * (1.2 + np.sin(np.arange(400_000) / 9e3))).astype(np.int16)
    data = encode(samples, level=level)
    info = flac_stream(data)
    for begin in [0, 1, 4095, 4096, 399_000, *rng.integers(0, 390_000, 60).tolist()]:
        end = min(begin + 8000, 400_000)
        first, last = flac_extent(data, info, begin, end)
        assert last - first < 0.4 * len(data)
        frames = np.frombuffer(data[first:last] + bytes(8), np.uint8)
        kind = {"channels": 1, "sample_bits": 16, "block_size": info.block_size}
        np.testing.assert_array_equal(kernels.decode_flac(frames, **kind, begin=begin, end=end), samples[begin:end])
