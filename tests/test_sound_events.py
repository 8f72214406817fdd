"""The generated data set: repeatable, varied, learnable, and never half there."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastsskd import sound_events
from fastsskd.audio.file import probe
from fastsskd.errors import InputError, UsageError
from fastsskd.layouts import index as layouts
from fastsskd.sound_synthesis import CLASSES


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    return sound_events.generate(tmp_path_factory.mktemp("generated") / "set", clips_per_class=6)


def test_is_a_data_set_with_every_class_and_format(small_set):
    clips = layouts.build(small_set)
    assert clips.classes == tuple(sorted(CLASSES)) and len(clips.classes) >= 10
    assert clips.class_counts().tolist() == [6] * len(CLASSES)
    for name in CLASSES:
        assert len({path.suffix for path in (small_set / name).iterdir()}) == 4
    assert {soundfile.info(path).subtype for path in small_set.glob("*/*.wav")} == {"PCM_16", "PCM_24", "FLOAT"}
    for path in small_set.glob("*/*.*"):
        probe(path.read_bytes())


def test_files_hold_what_make_clip_gives(small_set):
    for name, number in (("bell", 0), ("siren", 3), ("rain", 5)):
        clip, rate = sound_events.make_clip(name, number, seed=0)
        (path,) = (small_set / name).glob(f"{number:04d}.*")
        if path.suffix == ".ogg":
            continue
        stored, stored_rate = soundfile.read(path, always_2d=True)
        assert stored_rate == rate
        np.testing.assert_allclose(stored, clip, atol=2**-15)


def test_a_seed_gives_the_same_clips_and_another_seed_others():
    first, rate = sound_events.make_clip("dog_bark", 4, seed=1)
    again, _ = sound_events.make_clip("dog_bark", 4, seed=1)
    other, _ = sound_events.make_clip("dog_bark", 4, seed=2)
    assert rate in sound_events.RATES
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


@pytest.mark.parametrize("name", CLASSES)
def test_members_vary_and_are_sane(name):
    levels, lengths, rates, channels = [], [], set(), set()
    for number in range(12):
        clip, rate = sound_events.make_clip(name, number, seed=5)
        assert clip.dtype == np.float32 and np.isfinite(clip).all()
        levels.append(20 * np.log10(np.abs(clip).max()))
        lengths.append(len(clip) / rate)
        rates.add(rate)
        channels.add(clip.shape[1])
    assert min(levels) >= -30.01 and max(levels) <= -2.99 and np.std(levels) > 3
    assert min(lengths) >= 0.49 and max(lengths) <= 15 and max(lengths) > 2 * min(lengths)
    assert len(rates) > 2 and channels == {1, 2}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("seconds", "rate"), [(0.5, 8_000), (15.0, 8_000), (0.5, 48_000)])
def test_every_class_sounds_from_the_start_at_every_length(name, seconds, rate):
    for seed in range(5):
        wave = CLASSES[name](np.random.default_rng(seed), int(seconds * rate), rate)
        assert wave.shape == (int(seconds * rate),) and wave.dtype == np.float32
        assert np.isfinite(wave).all()
        assert np.abs(wave[: int(0.45 * rate)]).max() > 0.05 * np.abs(wave).max()


def test_classes_can_be_told_apart_but_not_by_their_spectrum_alone():
    """Nearest class mean on a coarse mean spectrum: far above chance (8 %), far from solved."""
    features, labels = [], []
    for label, name in enumerate(CLASSES):
        for number in range(10):
            clip, rate = sound_events.make_clip(name, number, seed=0)
            power = np.abs(np.fft.rfft(clip.mean(axis=1), 1 << 19)) ** 2  # odd lengths transform slowly
            frequency = np.fft.rfftfreq(1 << 19, 1 / rate)
            edges = np.geomspace(50, 4000, 17)
            bands = [power[(frequency >= low) & (frequency < high)].sum() for low, high in itertools.pairwise(edges)]
            features.append(np.log(np.array(bands) / sum(bands) + 1e-6))
            labels.append(label)
    features, labels = np.array(features), np.array(labels)
    training = np.arange(len(labels)) % 2 == 0
    means = np.stack([features[training & (labels == label)].mean(axis=0) for label in range(len(CLASSES))])
    distance = np.linalg.norm(features[~training][:, None] - means, axis=-1)
    accuracy = np.mean(distance.argmin(axis=1) == labels[~training])
    assert 0.3 < accuracy < 0.9


def test_reuses_its_own_set_and_nothing_else(tmp_path):
    folder = sound_events.generate(tmp_path / "set", clips_per_class=1)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    sound_events.generate(folder, clips_per_class=1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    with pytest.raises(InputError, match="other settings"):
        sound_events.generate(folder, clips_per_class=2)
    with pytest.raises(InputError, match="other settings"):
        sound_events.generate(folder, clips_per_class=1, seed=3)
    next(folder.glob("bell/*")).unlink()
    with pytest.raises(InputError, match="11 of 12"):
        sound_events.generate(folder, clips_per_class=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not lose")
    with pytest.raises(InputError, match="not empty"):
        sound_events.generate(tmp_path / "mine", clips_per_class=1)
    assert (tmp_path / "mine/thesis.txt").exists()


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    assert (sound_events.generate(tmp_path / "empty", clips_per_class=1) / sound_events.MARKER).exists()
    assert sound_events.generate(tmp_path / "a/b/set", clips_per_class=1).exists()


def test_a_killed_generation_leaves_no_set_and_its_leftovers_go(tmp_path):
    code = (
        "import os, sys\nfrom fastsskd import sound_events\n"
        "stop = lambda done, total: os.kill(os.getpid(), 9) if done == 5 else None\n"
        "sound_events.generate(sys.argv[1], clips_per_class=1, progress=stop)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "set")], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "set").exists() and any(tmp_path.iterdir())
    sound_events.generate(tmp_path / "set", clips_per_class=1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_interrupted_generation_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sound_events.generate(tmp_path / "set", clips_per_class=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_another_process_that_was_faster_wins(tmp_path):
    """Two ranks that start together: whoever renames second finds the set whole and uses it."""

    def be_overtaken(done, total):
        if done == total:
            (tmp_path / "set").mkdir()
            for name in CLASSES:
                (tmp_path / "set" / name).mkdir()
                (tmp_path / "set" / name / "0000.wav").touch()
            about = {"version": sound_events.VERSION, "clips_per_class": 1, "seed": 0, "classes": list(CLASSES)}
            (tmp_path / "set" / sound_events.MARKER).write_text(json.dumps(about))

    sound_events.generate(tmp_path / "set", clips_per_class=1, progress=be_overtaken)
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("wrong", [{"clips_per_class": 0}, {"seed": -1}])
def test_out_of_range(tmp_path, wrong):
    with pytest.raises(UsageError):
        sound_events.generate(tmp_path / "set", **wrong)


def test_command_line(tmp_path, capsys):
    assert sound_events.main(["--out", str(tmp_path / "set"), "--clips-per-class", "1", "--seed", "7"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "set") and "12/12 clips" in shown.err
    assert sound_events.main(["--out", str(tmp_path / "set"), "--clips-per-class", "2"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert sound_events.main(["--out", str(tmp_path / "x"), "--clips-per-class", "0"]) == 2
