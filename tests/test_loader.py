"""The loader: what is in a batch, exactly-once, exact resume, bad clips, clean shutdown."""

import threading

import damaged_audio
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
import torchaudio

import fastsskd_kernels as kernels
from fastsskd import manifest, stream
from fastsskd.audio.file import BadClip
from fastsskd.clip_bytes import ShardFiles
from fastsskd.clip_reader import ClipReader, Crop
from fastsskd.clip_table import SCHEMA
from fastsskd.errors import InputError
from fastsskd.layouts import index as layouts
from fastsskd.loader import Loader

SECONDS = 0.96


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """A folder of 26 clips in 2 classes: several lengths, rates and formats."""
    folder = tmp_path_factory.mktemp("tones")
    random = np.random.default_rng(0)
    kinds = [("wav", 16000), ("flac", 44100), ("ogg", 22050), ("wav", 48000)]
    for number in range(26):
        kind, rate = kinds[number % 4]
        time = np.arange(int(rate * random.uniform(0.3, 2.5))) / rate
        wave = 0.3 * np.sin(2 * np.pi * random.uniform(200, 3000) * time) + 0.01 * random.standard_normal(len(time))
        path = folder / ("low", "high")[number % 2] / f"clip{number:02d}.{kind}"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wave.astype(np.float32), rate)
    return folder


@pytest.fixture(scope="module")
def table(tones):
    return layouts.build(tones)


def collect(loader):
    """Every clip of a pass: {key: (fbank, hog, seed)} and the keys in order."""
    clips, order = {}, []
    for batch in loader:
        for row, key in enumerate(batch.key):
            assert key not in clips, f"{key} was delivered twice"
            clips[key] = (batch.fbank[row], batch.hog[row], int(batch.seed[row]))
            order.append(key)
    loader.close()
    return clips, order


def same(a, b):
    """Whether two deliveries of a clip are bit for bit the same."""
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def test_batch_has_the_promised_shapes_and_types(table):
    loader = Loader(table, batch_size=4, seconds=SECONDS, train=True, waveform=True)
    batch = next(iter(loader))
    loader.close()
    assert batch.fbank.shape == (4, 96, 128) and batch.fbank.dtype == torch.float32
    assert batch.hog.shape == (4, 48) and batch.label.shape == (4,) and batch.label.dtype == torch.int64
    assert batch.waveform.shape == (4, 15360) and batch.seed.dtype == torch.int64
    for row, key in enumerate(batch.key):
        index = int(batch.index[row])
        assert table.key(index) == key and table.labels(index).tolist() == [int(batch.label[row])]


def test_features_are_kaldis_of_the_delivered_waveform(table):
    loader = Loader(table, batch_size=8, seconds=SECONDS, train=True, waveform=True, mean=-5.0, std=3.0)
    batch = next(iter(loader))
    loader.close()
    for wave, fbank, hog in zip(batch.waveform, batch.fbank, batch.hog, strict=True):
        kaldi = torchaudio.compliance.kaldi.fbank(
            wave[None], htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning",
            num_mel_bins=128, dither=0.0, frame_shift=10,
        )  # fmt: skip
        padded = torch.cat([kaldi, torch.zeros(2, 128)])  # 94 frames -> 96, before normalisation
        difference = (fbank * 6.0 - 5.0 - padded).abs()
        # Above 7.5 kHz a resampled clip holds next to nothing, so there the logarithm shows float32's own rounding.
        assert difference[:, :120].max() < 5e-3 and difference.max() < 2e-2 and difference.mean() < 5e-5
        repeated = torch.cat([kaldi, kaldi[-1:], kaldi[-1:]])
        expected = kernels.hog_patch_mean(repeated[None], backend="torch")[0]
        assert torch.allclose(hog, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seconds", [0.2, SECONDS])
def test_asking_for_the_waveform_changes_nothing_else(table, seconds):
    """Without it a crop that needs no resampling is used where it lies, 16-bit or float."""
    options = {"batch_size": 4, "seconds": seconds, "train": True, "seed": 4}
    without, _ = collect(Loader(table, **options))
    with_waveform, _ = collect(Loader(table, waveform=True, **options))
    assert without.keys() == with_waveform.keys()
    assert all(same(without[key], with_waveform[key]) for key in without)


def test_long_clips_are_cropped_and_short_ones_looped(tmp_path):
    ramp = (np.arange(40000) / 80000).astype(np.float32)  # every value says where it was
    soundfile.write(tmp_path / "long.wav", ramp, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", ramp[:1000], 16000, subtype="FLOAT")
    loader = Loader(layouts.build(tmp_path), batch_size=2, seconds=1.0, train=True, waveform=True, seed=5)
    starts = set()
    for _ in range(6):
        for batch in loader:
            waves = dict(zip(batch.key, batch.waveform.numpy(), strict=True))
            (long,) = (wave for key, wave in waves.items() if "long" in key)
            (short,) = (wave for key, wave in waves.items() if "short" in key)
            start = round(long[0] * 80000)
            np.testing.assert_array_equal(long, ramp[start : start + 16000])
            turn = round(short[0] * 80000)
            np.testing.assert_array_equal(short, np.resize(np.roll(ramp[:1000], -turn), 16000))
            starts.add((start, turn))
    loader.close()
    assert len(starts) == 6, "crops must differ between epochs"


def test_evaluation_starts_at_zero_in_order_and_repeats(table):
    loader = Loader(table, batch_size=5, seconds=SECONDS, train=False, waveform=True)
    first = [(batch.key, batch.waveform) for batch in loader]
    again = [(batch.key, batch.waveform) for batch in loader]
    loader.close()
    assert [key for keys, _ in first for key in keys] == [table.key(i) for i in range(len(table))]
    assert len(first) == len(loader) == 6
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    wave, rate = soundfile.read(table.path(0), dtype="float32")
    if rate == 16000:
        length = min(len(wave), first[0][1].shape[1])
        np.testing.assert_allclose(first[0][1][0][:length], wave[:length], atol=1e-4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_clip_once_and_the_same_on_any_number_of_ranks(table, world_size):
    whole, _ = collect(Loader(table, batch_size=8, seconds=SECONDS, train=True, seed=3))
    merged = {}
    for rank in range(world_size):
        clips, _ = collect(
            Loader(
                table, batch_size=3, seconds=SECONDS, train=True, seed=3, rank=rank, world_size=world_size, workers=1
            )
        )
        assert not merged.keys() & clips.keys()
        merged |= clips
    assert merged.keys() == whole.keys() == {table.key(i) for i in range(len(table))}
    assert all(same(merged[key], whole[key]) for key in whole)


def test_epochs_differ_and_seeds_differ(table):
    def order(seed, epochs):
        loader = Loader(table, batch_size=8, seconds=SECONDS, train=True, seed=seed)
        orders = [[key for batch in loader for key in batch.key] for _ in range(epochs)]
        loader.close()
        return orders

    first, second = order(0, 2)
    assert first != second and sorted(first) == sorted(second)
    assert order(1, 1)[0] != first


@pytest.mark.parametrize(("then", "batch_size", "workers"), [(1, 4, 1), (2, 3, 2), (3, 2, 1)])
def test_resume_in_the_middle_of_an_epoch(table, then, batch_size, workers):
    """Stop after 3 batches of the second epoch on one rank; continue with other ranks, batch sizes and workers."""
    options = {"seconds": SECONDS, "train": True, "seed": 7}
    whole = Loader(table, batch_size=4, **options)
    list(whole)
    expected, _ = collect(whole)  # all of epoch 1

    first = Loader(table, batch_size=4, **options)
    list(first)
    got = {}
    for _, batch in zip(range(3), first, strict=False):
        got |= {key: (batch.fbank[i], batch.hog[i], int(batch.seed[i])) for i, key in enumerate(batch.key)}
        state = first.state_dict()
    first.close()
    assert (state["epoch"], state["position"]) == (1, 12)

    for rank in range(then):
        loader = Loader(table, batch_size=batch_size, rank=rank, world_size=then, workers=workers, **options)
        loader.load_state_dict(state)
        clips, _ = collect(loader)
        assert not got.keys() & clips.keys()
        got |= clips
    assert got.keys() == expected.keys()
    assert all(same(got[key], expected[key]) for key in expected)


def test_state_of_other_data_or_another_seed_is_refused(table):
    state = Loader(table, batch_size=4, seconds=SECONDS, train=True).state_dict()
    with pytest.raises(InputError, match="another manifest"):
        Loader(table.select(np.arange(10)), batch_size=4, seconds=SECONDS, train=True).load_state_dict(state)
    with pytest.raises(InputError, match="seed"):
        Loader(table, batch_size=4, seconds=SECONDS, train=True, seed=1).load_state_dict(state)


def test_drop_last_to_keeps_whole_global_batches(table):
    loader = Loader(table, batch_size=4, seconds=SECONDS, train=True, drop_last_to=8)
    sizes = [len(batch) for batch in loader]
    loader.close()
    assert sizes == [4] * 6


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Every good and every bad file the tests know of, in one folder, and a file that goes missing."""
    folder = tmp_path_factory.mktemp("damaged")
    good, bad = damaged_audio.good_clips(), damaged_audio.bad_clips()
    for name, data in {**good, **bad}.items():
        (folder / name).write_bytes(data)
    names = [*good, *bad, "missing.wav"]
    (folder / "missing.wav").write_bytes(b"")
    lines = "\n".join(["path,label", *(f"{name},{'a' if i % 2 else 'b'}" for i, name in enumerate(names))])
    (folder / "clips.csv").write_text(lines + "\n")
    table = manifest.load(folder / "clips.csv")
    (folder / "missing.wav").unlink()
    return table, set(good), {*bad, "missing.wav"}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("train", [True, False])
def test_bad_clips_are_left_out_named_and_never_replaced(damaged, world_size, train):
    table, good, bad = damaged
    name = {table.key(i): table.path(i).name for i in range(len(table))}
    delivered, skipped = [], {}
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "train": train}
        loader = Loader(table, batch_size=4, seconds=SECONDS, **options)
        batches = list(loader)
        loader.close()
        assert len(batches) == len(loader)
        for batch in batches:
            assert torch.isfinite(batch.fbank).all() and torch.isfinite(batch.hog).all()
            assert len(batch.fbank) == len(batch.hog) == len(batch.label) == len(batch.key) == len(batch.seed)
            labels = table.label_of(batch.index.numpy())
            assert batch.label.tolist() == labels.tolist()
        delivered += [name[key] for batch in batches for key in batch.key]
        skipped |= {name[key]: reason for key, reason in loader.skipped.items()}
    assert sorted(delivered) == sorted(good)
    assert skipped.keys() == bad
    for reason in skipped.values():
        assert reason and "\n" not in reason


def test_good_clips_beside_bad_ones_are_what_they_are_alone(damaged):
    table, _, _ = damaged
    mixed, _ = collect(Loader(table, batch_size=7, seconds=SECONDS, train=False))
    for i in range(len(table)):
        if table.key(i) in mixed:
            alone, _ = collect(Loader(table.select(np.array([i])), batch_size=1, seconds=SECONDS, train=False))
            assert same((*alone[table.key(i)][:2], 0), (*mixed[table.key(i)][:2], 0))


def test_too_many_bad_clips_stop_clearly(damaged):
    table, _, _ = damaged
    loader = Loader(table, batch_size=4, seconds=SECONDS, max_bad_share=0.05)
    with pytest.raises(InputError, match="clips are bad, more than"):
        list(loader)
    loader.close()


def test_a_file_replaced_during_the_run_is_found(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02d}.wav").write_bytes(damaged_audio.encode(damaged_audio.tone(seed=number)))
    loader = Loader(layouts.build(tmp_path), batch_size=4, seconds=SECONDS, train=True)
    assert sum(len(batch) for batch in loader) == 12
    loader.close()
    (tmp_path / "03.wav").write_bytes(b"<html>not found</html>")
    (tmp_path / "05.wav").unlink()
    assert sum(len(batch) for batch in loader) == 10
    loader.close()
    assert sorted(key[-2:] if key[-1].isdigit() else key[-6:-4] for key in loader.skipped) == ["03", "05"]


def test_nothing_is_left_running(table):
    before = threading.active_count()
    loader = Loader(table, batch_size=4, seconds=SECONDS, train=True)
    next(iter(loader))
    assert threading.active_count() > before
    loader.close()
    loader = Loader(table, batch_size=4, seconds=SECONDS, train=True)
    next(iter(loader))
    del loader  # forgotten rather than closed
    assert threading.active_count() == before


def test_an_error_in_the_producer_reaches_the_consumer(table, monkeypatch):
    def broken(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(stream.kernels, "features", broken)
    loader = Loader(table, batch_size=4, seconds=SECONDS, train=True)
    with pytest.raises(MemoryError, match="no room"):
        next(iter(loader))
    with pytest.raises(RuntimeError, match="ended after an error"):  # rather than wait for ever
        next(iter(loader))
    loader.close()


def test_arguments_are_checked(table):
    with pytest.raises(ValueError, match="batch_size 0"):
        Loader(table, batch_size=0)
    with pytest.raises(InputError, match="make no batch of 64"):
        Loader(table, batch_size=8, train=True, drop_last_to=64)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Loader(table, batch_size=1, rank=2, world_size=2)


def test_the_inputs_for_a_gpu_give_the_same_waveforms(damaged):
    """The producer's way to a GPU, as far as a machine without one can go: the same steps, on a CPU."""
    table, good, _ = damaged
    compared = 0
    for segment in ((0.0, -1.0), (0.01, 0.05)):
        columns = table.table
        for name, value in zip(("start", "end"), segment, strict=True):
            values = pa.array([value] * len(table), pa.float32())
            columns = columns.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), values)
        reader, crop = ClipReader(table.replace(table=columns), ShardFiles(table.root), 1), Crop(15360, 0.37)
        for i in range(len(table)):
            if table.path(i).name not in good:
                continue
            ((_, clip),) = reader.read([i], [crop])
            if isinstance(clip, BadClip):  # shorter than where the segment starts
                assert "before its segment" in str(clip)
                continue
            row = np.empty(15360, np.float32)
            stream.crop_into(row, clip, crop)
            waveform = kernels.resample_on_device([stream.inputs_for_device(clip, crop)], 15360, "cpu")[0]
            np.testing.assert_allclose(waveform, row, atol=2e-5 * max(1.0, np.abs(row).max()))
            compared += 1
    assert compared > 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_made_on_a_gpu_are_those_made_on_a_cpu(table):
    batches = {}
    for device in ("cpu", "cuda"):
        loader = Loader(table, batch_size=5, seconds=SECONDS, train=True, seed=2, device=device, waveform=True)
        batches[device] = [batch.to("cpu") for batch in loader]
        loader.close()
    for cpu, gpu in zip(batches["cpu"], batches["cuda"], strict=True):
        assert cpu.key == gpu.key and torch.equal(cpu.seed, gpu.seed) and torch.equal(cpu.label, gpu.label)
        torch.testing.assert_close(gpu.waveform, cpu.waveform, atol=2e-5, rtol=0)
        # Quiet bins show float32's rounding of the two Fourier transforms; the bulk must agree.
        assert (gpu.fbank - cpu.fbank).abs().mean() < 1e-3
        torch.testing.assert_close(gpu.hog, cpu.hog, atol=0.05, rtol=0.02)
