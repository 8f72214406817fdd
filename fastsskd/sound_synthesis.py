"""Twelve everyday sounds from formulas: one function a class, drawn anew for every clip.

Each function takes a generator, a length in samples and a sampling rate in Hz, and returns (num_samples,) float32 of
no particular level. Pitch, timing, number of repeats and colour are drawn inside; level, room and background noise are
`fastsskd.sound_events`' part. Some classes are neighbours on purpose (knocks, footsteps and ticks; rain and wind; beeps
and sirens), so that telling them apart takes more than a spectrum.
"""

from collections.abc import Callable

import numpy as np

Rng = np.random.Generator
HIGHEST = 0.42
"""Highest frequency we put a tone at, as a share of the sampling rate."""
BELL_PARTIALS = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.51, 2.66, 3.01, 4.1, 5.4])


def alarm_beeps(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """Groups of short beeps of one steady pitch."""
    pitch, on = _log_uniform(rng, 700, 3200), rng.uniform(0.05, 0.18)
    gap, pause, group = on * rng.uniform(0.6, 1.6), rng.uniform(0.2, 0.9), int(rng.integers(1, 6))
    overtones = rng.choice([0.0, 0.3, 0.6])
    beep = _tone(np.full(int(on * rate), pitch), rate, [1.0, 0.0, overtones, 0.0, overtones / 2])
    beep *= _plateau(len(beep), int(0.004 * rate))
    starts = [start + k * (on + gap) for start in np.arange(0, 16, group * (on + gap) + pause) for k in range(group)]
    return _place([(start + rng.uniform(0, 0.01), beep) for start in starts], num_samples, rate)


def bell(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """Struck metal: inharmonic partials, the high ones dying first."""
    pitch, ring = _log_uniform(rng, 180, 1100), rng.uniform(0.5, 3.0)
    ratios = BELL_PARTIALS * rng.uniform(0.985, 1.015, len(BELL_PARTIALS))
    strengths = rng.uniform(0.2, 1.0, len(ratios)) / ratios**0.4
    seconds = np.arange(min(num_samples, int(4 * ring * rate)), dtype=np.float32) / rate
    strike = np.zeros(len(seconds), np.float32)
    for ratio, strength in zip(ratios, strengths, strict=True):
        if ratio * pitch < HIGHEST * rate:
            decay = np.exp(-seconds * np.float32(ratio**0.7 * 2 / ring))
            strike += np.float32(strength) * decay * np.sin(np.float32(2 * np.pi * ratio * pitch) * seconds)
    times = rng.uniform(0, 0.15) + rng.uniform(0.7, 2.5) * np.arange(int(rng.integers(1, 10)))
    return _place([(time, strike * rng.uniform(0.6, 1.0)) for time in times], num_samples, rate)


def bird_chirps(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """Phrases of whistled sweeps, repeated by the same bird."""
    top = min(6000.0, HIGHEST * rate)
    centre, spread = _log_uniform(rng, 2000, 0.8 * top), rng.uniform(0.08, 0.3)
    syllables = []
    for _ in range(int(rng.integers(1, 4))):
        length = int(rng.uniform(0.04, 0.16) * rate)
        course = np.linspace(-1, 1, length)
        bend = rng.uniform(-1, 1) * course + rng.uniform(-1, 1) * course**2
        trill = rng.choice([0.0, 0.05]) * np.sin(2 * np.pi * rng.uniform(20, 45) * np.arange(length) / rate)
        pitch = np.clip(centre * (1 + spread * bend + trill), 800, top)
        syllables.append(_tone(pitch, rate, [1.0, 0.1]) * np.hanning(length).astype(np.float32))
    events, time = [], rng.uniform(0, 0.2)
    while time < num_samples / rate:
        for _ in range(int(rng.integers(1, 4))):
            for syllable in syllables:
                events.append((time, syllable * rng.uniform(0.7, 1.0)))
                time += len(syllable) / rate + rng.uniform(0.01, 0.06)
        time += rng.uniform(0.2, 1.2)
    return _place(events, num_samples, rate)


def clock_ticks(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """Dry clicks of two alternating colours at a strict beat."""
    beat = rng.choice([0.25, 0.5, 0.5, 1.0]) * rng.uniform(0.96, 1.04)
    high = _log_uniform(rng, 1500, min(5500, HIGHEST * rate))
    clicks = [
        _resonance(rng, high * lower, rng.uniform(0.003, 0.009), 0.06, rate, noise=0.8)
        + 0.4 * _resonance(rng, high * lower * 0.37, 0.012, 0.06, rate, noise=0.1)
        for lower in (1.0, rng.uniform(0.7, 0.95))
    ]
    times = np.arange(rng.uniform(0, min(beat, 0.3)), num_samples / rate, beat)
    return _place([(time, clicks[i % 2]) for i, time in enumerate(times)], num_samples, rate)


def dog_bark(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """Barks: a hoarse voice whose pitch rises and falls, through a mouth that opens and shuts."""
    pitch, length = _log_uniform(rng, 220, 700), rng.uniform(0.1, 0.26)
    hoarse, mouth = rng.uniform(0.25, 0.8), rng.uniform(700, 1500)
    events, time = [], rng.uniform(0, 0.15)
    while time < num_samples / rate:
        for _ in range(int(rng.integers(1, 4))):
            size = int(length * rng.uniform(0.85, 1.15) * rate)
            course = np.linspace(0, 1, size)
            voice = _tone(pitch * (0.8 + 0.5 * np.sin(np.pi * course**0.7)), rate, 1 / np.arange(1, 13) ** 0.6)
            voice += hoarse * rng.standard_normal(size, np.float32)
            shape = (course**0.25 * (1 - course) ** 0.8).astype(np.float32)
            events.append((time, _peaked(voice * shape, rate, mouth, 0.6)))
            time += size / rate + rng.uniform(0.08, 0.3)
        time += rng.uniform(0.3, 1.5)
    return _place(events, num_samples, rate)


def engine(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """A motor: a low pulse train with many overtones, uneven from stroke to stroke, and its hiss."""
    speed = _log_uniform(rng, 22, 110) * (1 + rng.uniform(0, 0.25) * _slow(rng, num_samples, rate, 0.6))
    strokes = int(rng.choice([2, 3, 4]))
    phase = np.cumsum(speed / rate).astype(np.float64)
    pulse = np.float32(2.0) ** (8 * (np.cos(2 * np.pi * phase).astype(np.float32) - 1))  # narrow, all overtones
    uneven = 1 + rng.uniform(0.1, 0.5) * np.cos(2 * np.pi * phase / strokes).astype(np.float32)
    hiss = _noise(rng, num_samples, rate, 200, rng.uniform(1500, 5000)) * (0.3 + pulse)
    muffled = _peaked(pulse * uneven - np.mean(pulse * uneven), rate, rng.uniform(80, 400), 1.2)
    return muffled / _rms(muffled) + rng.uniform(0.05, 0.4) * hiss / _rms(hiss)


def footsteps(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """Steps: a dull heel, then the sole's scrape, at a walker's slightly uneven pace."""
    pace, heel, ground = rng.uniform(0.32, 0.75), rng.uniform(55, 160), _log_uniform(rng, 400, 2200)
    scrape_level, delay = rng.uniform(0.3, 1.2), rng.uniform(0.04, 0.11)
    events, time = [], rng.uniform(0, 0.2)
    while time < num_samples / rate:
        scrape = _noise(rng, int(rng.uniform(0.05, 0.14) * rate), rate, ground * 0.5, ground * 2.5)
        scrape *= np.hanning(len(scrape)).astype(np.float32) * scrape_level / 3
        thump = _resonance(rng, heel * rng.uniform(0.9, 1.1), 0.035, 0.2, rate, noise=0.15)
        events += [(time, thump * rng.uniform(0.7, 1.0)), (time + delay, scrape * rng.uniform(0.6, 1.0))]
        time += pace * rng.uniform(0.9, 1.1)
    return _place(events, num_samples, rate)


def glass_break(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """A crash, then a shower of splinters ringing high."""
    top, events = min(9000.0, HIGHEST * rate), []
    for start in [0.0, *np.cumsum(rng.uniform(1.2, 4.0, int(rng.integers(0, 4))))]:
        begin = start + rng.uniform(0, 0.1)
        crash = _noise(rng, int(0.25 * rate), rate, 1000, top)
        crash *= np.exp(-np.arange(len(crash), dtype=np.float32) / rate / rng.uniform(0.02, 0.07))
        events.append((begin, 0.5 * crash))
        for wait in rng.exponential(rng.uniform(0.1, 0.35), int(rng.integers(25, 70))):
            pitch = _log_uniform(rng, 1800, top)
            splinter = _resonance(rng, pitch, rng.uniform(0.01, 0.07), 0.25, rate, noise=0.05)
            events.append((begin + wait, splinter * rng.uniform(0.1, 0.8) * np.exp(-2 * wait)))
    return _place(events, num_samples, rate)


def door_knock(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """Groups of two to five knocks on wood: two damped resonances, no scrape."""
    wood, gap = _log_uniform(rng, 130, 600), rng.uniform(0.11, 0.28)
    damping, second = rng.uniform(0.012, 0.04), rng.uniform(1.7, 2.8)
    events, time = [], rng.uniform(0, 0.15)
    while time < num_samples / rate:
        for _ in range(int(rng.integers(2, 6))):
            knock = _resonance(rng, wood, damping, 0.2, rate, noise=0.2)
            knock += 0.6 * _resonance(rng, wood * second, damping * 0.6, 0.2, rate, noise=0.3)
            events.append((time, knock * rng.uniform(0.7, 1.0)))
            time += gap * rng.uniform(0.92, 1.08)
        time += rng.uniform(0.5, 1.8)
    return _place(events, num_samples, rate)


def rain(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """A steady hiss of far drops and single near ones."""
    hiss = _noise(
        rng, num_samples, rate, rng.uniform(300, 1500), min(9000, HIGHEST * rate), tilt=rng.uniform(-0.6, 0.4)
    )
    per_second = _log_uniform(rng, 15, 120)
    drops = np.zeros(num_samples, np.float32)
    where = rng.integers(0, num_samples, int(per_second * num_samples / rate))
    np.add.at(drops, where, (rng.exponential(1.0, len(where)) * rng.choice([-1, 1], len(where))).astype(np.float32))
    near = _peaked(drops, rate, _log_uniform(rng, 900, 3000), 0.8)
    return hiss / _rms(hiss) + rng.uniform(0.5, 1.6) * near / max(_rms(near), 1e-9)


def siren(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """A tone that never rests: wailing, yelping, or two notes in turn."""
    low = _log_uniform(rng, 350, 800)
    high = low * rng.uniform(1.3, 2.4)
    kind = rng.choice(["wail", "yelp", "two notes"])
    turns = (
        rng.uniform(0.15, 0.5) if kind == "wail" else rng.uniform(1.5, 4.5) if kind == "yelp" else rng.uniform(0.5, 1.2)
    )
    swing = np.sin(2 * np.pi * (turns * np.arange(num_samples) / rate + rng.uniform(0, 1)))
    swing = np.tanh(30 * swing) if kind == "two notes" else swing
    strengths = 1 / np.arange(1, 9) ** rng.uniform(0.8, 2.0)
    wave = _tone(low * (high / low) ** ((swing + 1) / 2), rate, strengths)
    return wave * (1 + 0.3 * _slow(rng, num_samples, rate, 0.5)).astype(np.float32)


def wind(rng: Rng, num_samples: int, rate: int) -> np.ndarray:
    """Gusts of low noise, with a whistle that rises with them."""
    gust = 0.5 + 0.5 * _slow(rng, num_samples, rate, rng.uniform(0.3, 1.0))
    body = _noise(rng, num_samples, rate, 40, rng.uniform(250, 700), tilt=-1.0)
    wave = body / _rms(body) * (0.15 + gust**1.5)
    pitch = _log_uniform(rng, 300, 900) * (1 + 0.5 * gust)
    # Noise turned into a narrow band around a moving pitch: a slow random amplitude on a tone.
    whistle = _tone(pitch, rate, [1.0]) * _slow(rng, num_samples, rate, 40.0)
    return (wave + rng.uniform(0.1, 0.7) * whistle * gust**2).astype(np.float32)


CLASSES: dict[str, Callable[[Rng, int, int], np.ndarray]] = {
    make.__name__: make
    for make in [
        *(alarm_beeps, bell, bird_chirps, clock_ticks, dog_bark, door_knock),
        *(engine, footsteps, glass_break, rain, siren, wind),
    ]
}


# ---------------------------------------------------------------------------------------------------- building blocks


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(max(high, low * 1.01)))))


def _tone(pitch: np.ndarray, rate: int, strengths) -> np.ndarray:
    """Harmonic tone whose pitch (n,) in Hz may move; overtones beyond what the rate holds are left out."""
    phase = 2 * np.pi * np.cumsum(pitch / rate)
    # Sine of a reduced phase: float32 is then exact enough and twice as fast.
    phase = np.remainder(phase, 2 * np.pi).astype(np.float32)
    wave = np.zeros(len(pitch), np.float32)
    for k, strength in enumerate(strengths, start=1):
        if strength and k * np.max(pitch) < HIGHEST * rate:
            wave += np.float32(strength) * np.sin(k * phase)
    return wave


def _resonance(rng: Rng, pitch: float, decay: float, length: float, rate: int, noise: float) -> np.ndarray:
    """A struck body: a damped sine of `decay` seconds with a click of noise at its start."""
    seconds = np.arange(int(length * rate), dtype=np.float32) / rate
    pitch = min(pitch, HIGHEST * rate)
    wave = np.sin(np.float32(2 * np.pi * pitch) * seconds) * np.exp(-seconds / np.float32(decay))
    click = rng.standard_normal(len(seconds), np.float32) * np.exp(-seconds / np.float32(decay / 4))
    return wave + np.float32(noise) * click


def _noise(rng: Rng, num_samples: int, rate: int, low: float, high: float, tilt: float = 0.0) -> np.ndarray:
    """Gaussian noise between two frequencies with soft edges; `tilt` is the power of frequency along the band."""
    return _filtered(rng.standard_normal(num_samples, np.float32), rate, low, high, tilt)


def _filtered(wave: np.ndarray, rate: int, low: float, high: float, tilt: float) -> np.ndarray:
    size = -(-len(wave) // 4096) * 4096  # lengths with large prime factors make slow transforms
    spectrum = np.fft.rfft(wave, size)
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / rate), 1.0)
    gain = (frequency / 1000) ** tilt / np.sqrt((1 + (low / frequency) ** 4) * (1 + (frequency / high) ** 4))
    return np.fft.irfft(spectrum * gain, size)[: len(wave)].astype(np.float32)


def _peaked(wave: np.ndarray, rate: int, centre: float, octaves: float) -> np.ndarray:
    """Band around a centre frequency (Hz), `octaves` wide on either side."""
    return _filtered(wave, rate, centre * 2**-octaves, centre * 2**octaves, 0.0)


def _slow(rng: Rng, num_samples: int, rate: int, hertz: float) -> np.ndarray:
    """Smooth random course within -1..1 that turns about `hertz` times a second."""
    knots = rng.uniform(-1, 1, max(4, int(num_samples / rate * hertz * 2) + 4))
    at = np.linspace(0, len(knots) - 1.001, num_samples)
    left = at.astype(np.int64)
    share = (1 - np.cos(np.pi * (at - left))) / 2
    return (knots[left] * (1 - share) + knots[left + 1] * share).astype(np.float32)


def _plateau(num_samples: int, ramp: int) -> np.ndarray:
    edge = np.minimum(np.arange(num_samples), np.arange(num_samples)[::-1]) / max(ramp, 1)
    return np.minimum(edge, 1).astype(np.float32)


def _place(events: list[tuple[float, np.ndarray]], num_samples: int, rate: int) -> np.ndarray:
    """Add sounds at their times (seconds); what falls outside is cut."""
    wave = np.zeros(num_samples, np.float32)
    for time, sound in events:
        start = int(time * rate)
        part = wave[start : start + len(sound)]
        part += sound[: len(part)].astype(np.float32)
    return wave


def _rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float32)) + 1e-20))
