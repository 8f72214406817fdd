"""What a loader may cost and when it must stop: bad clips, memory, what it leaves behind."""

import os
import subprocess
import sys

import damaged_audio
import numpy as np
import pytest

from fastsskd import manifest
from fastsskd.clip_columns import from_columns
from fastsskd.errors import InputError
from fastsskd.layouts import index as layouts
from fastsskd.loader import MAX_AHEAD, Loader
from fastsskd.stream import PART


def run(code, *arguments):
    """Run Python code in a process of its own; its output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """40 good clips of several formats and 8 bad ones."""
    folder = tmp_path_factory.mktemp("mixed")
    good, bad = list(damaged_audio.good_clips().items()), list(damaged_audio.bad_clips().items())
    for number in range(40):
        name, data = good[number % len(good)]
        (folder / f"{number:02d}{name[name.find('.') :]}").write_bytes(data)
    for number in range(8):
        (folder / f"bad{number}.wav").write_bytes(bad[7 * number][1])
    return folder


# ---  bad clips


def test_a_number_of_bad_clips_stops_clearly(mixed):
    loader = Loader(mixed, batch_size=4, seconds=0.5, max_bad=3)
    with pytest.raises(
        InputError, match=r"4 of \d+ clips are bad, more than data\.max_bad = 3 \(first: bad0\.wav: "
    ) as e:
        for _ in loader:
            pass
    loader.close()
    assert "\n" not in str(e.value)
    loader = Loader(mixed, batch_size=4, seconds=0.5, max_bad=8, max_bad_share=0.5)
    assert sum(len(batch) for batch in loader) == 40 and len(loader.skipped) == 8
    loader.close()


def test_ranks_name_bad_clips_in_one_file(mixed, tmp_path):
    log, skipped = tmp_path / "skipped.tsv", {}
    for rank in range(2):
        loader = Loader(mixed, batch_size=4, seconds=0.5, train=True, rank=rank, world_size=2, skip_log=log)
        for _ in range(3):
            for _ in loader:
                pass
        loader.close()
        skipped |= loader.skipped
    rows = dict(line.rstrip("\n").split("\t") for line in log.read_text().splitlines())
    assert rows == skipped and len(rows) == 8 == len(log.read_text().splitlines())


# ---  weights


def test_weights_decide_how_often_a_clip_is_drawn(mixed, tmp_path):
    table = layouts.build(mixed)
    weights = np.zeros(len(table))
    weights[[3, 5]] = 1.0, 3.0
    np.savetxt(tmp_path / "weights.csv", weights)
    counts = {}
    for given in (weights, tmp_path / "weights.csv", str(tmp_path / "weights.csv")):
        loader = Loader(table, batch_size=16, seconds=0.2, train=True, weights=given)
        keys = [key for _ in range(4) for batch in loader for key in batch.key]
        loader.close()
        counts = {key: keys.count(key) for key in set(keys)}
        assert counts.keys() == {table.key(3), table.key(5)}
        assert 0.15 < counts[table.key(3)] / len(keys) < 0.35


@pytest.mark.parametrize(
    ("text", "message"),
    [("1\n2\n", "2 sampling weights for 48"), ("one\n", "one number a line"), ("0\n" * 48, "above 0")],
)
def test_weights_that_cannot_be_are_one_line(mixed, tmp_path, text, message):
    (tmp_path / "w.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        Loader(mixed, batch_size=4, train=True, weights=tmp_path / "w.csv")
    with pytest.raises(InputError, match="finite"):
        Loader(mixed, batch_size=4, train=True, weights=np.full(48, np.nan))


# ------------------------------------------------------------------------------------------- threads, memory, time


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (8, 16), (32, 2), (64, 4), (256, 8), (4096, 2)])
def test_prefetch_is_chosen_within_bounds_and_shown(mixed, batch_size, workers):
    loader = Loader(mixed, batch_size=batch_size, workers=workers)
    megabytes = batch_size * 1024 * 128 * 4
    assert 2 <= loader.prefetch <= 64
    assert loader.prefetch == 2 or loader.prefetch * megabytes <= MAX_AHEAD
    assert loader.prefetch * batch_size >= min(2 * workers * PART, 64 * batch_size) or loader.prefetch == 2
    assert f"{workers} worker thread(s), {loader.prefetch} batches of {batch_size} ahead" in loader.describe()
    assert Loader(mixed, batch_size=batch_size, prefetch=5).prefetch == 5


def test_memory_does_not_grow_over_twenty_epochs(mixed):
    code = """if True:
        import sys
        from fastsskd.loader import Loader

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096

        loader = Loader(sys.argv[1], batch_size=6, seconds=1.0, train=True, workers=2, waveform=True)
        sizes = []
        for _ in range(60):
            for batch in loader:
                held = batch
            sizes.append(resident())
        print(min(sizes[20:25]), min(sizes[-5:]), len(loader.skipped))
    """
    # The first epochs size the decoders' and the allocator's own pools.
    early, late, num_bad = map(int, run(code, mixed).split())
    assert num_bad == 8
    assert late - early < 6e6, f"grew from {early / 1e6:.1f} to {late / 1e6:.1f} MB"


@pytest.mark.parametrize("ending", ["", "loader.close()", "raise SystemExit(0)", "del loader"])
def test_a_process_that_ends_in_the_middle_leaves_nothing(mixed, ending):
    before = set(os.listdir("/dev/shm"))
    code = (
        "import os, sys, threading\nfrom fastsskd.loader import Loader\n"
        "loader = Loader(sys.argv[1], batch_size=4, seconds=1.0, train=True)\n"
        "next(iter(loader))\nprint(os.getpid(), flush=True)\n" + ending
    )
    pid = run(code, mixed).strip()
    assert not os.path.exists(f"/proc/{pid}")
    ours = {name for name in set(os.listdir("/dev/shm")) - before if pid in name}
    assert not ours


@pytest.fixture(scope="module")
def two_million(tmp_path_factory):
    """A manifest of 2 M clips in 3 classes, all of them in one small file."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "a.wav").write_bytes(damaged_audio.good_clips()["pcm16.wav"])
    number = np.arange(2_000_000)
    keys = np.char.add("clip", number.astype("U7"))
    table = from_columns(["a.wav"] * len(number), root=folder, keys=keys, labels=number % 3, classes=["a", "b", "c"])
    manifest.save(table, folder / "many.manifest")
    return folder / "many.manifest"


def test_two_million_clips_cost_a_rank_less_than_400_mb(two_million):
    """Memory of its own: what ranks of a machine share through the page cache is there once."""
    code = """if True:
        import sys
        import numpy as np
        from fastsskd.loader import Loader
        from fastsskd.clip_columns import from_columns

        def own():
            with open("/proc/self/smaps_rollup") as file:
                return sum(int(line.split()[1]) for line in file if line.startswith("Private"))

        before = own()
        loader = Loader(sys.argv[1], batch_size=4, seconds=1.0, train=True, rank=1, world_size=2)
        batches = iter(loader)
        keys = [key for _ in range(3) for key in next(batches).key]
        state = loader.state_dict()
        print(own() - before, len(set(keys)), state["position"], len(loader))
        loader.close()
    """
    grown, num_keys, position, num_batches = map(int, run(code, two_million).split())
    assert (num_keys, position, num_batches) == (12, 24, 250_000)
    assert grown < 400_000
