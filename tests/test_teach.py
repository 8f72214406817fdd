"""`fastsskd teach` and training from what it stored: the same crops, the same losses, and no way to end it harms it."""

import fcntl
import json
import os
import shlex
import shutil
import signal

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from test_distill import FixedTeacher, make_distill, used_model
from training import losses

import fastsskd_kernels as kernels
from fastsskd import cli, manifest
from fastsskd.answers import scores as stored_scores
from fastsskd.answers import teach as teaching
from fastsskd.answers.row_file import RowFile
from fastsskd.answers.stored import BAD, NOT_YET, STORED, Crops, StoredAnswers
from fastsskd.answers.teach import Options, teach
from fastsskd.config import AUDIOSET_MEAN, AUDIOSET_STD, AugmentConfig, from_dict
from fastsskd.errors import InputError, UsageError
from fastsskd.layouts import index as layouts
from fastsskd.loader import Loader
from fastsskd.model import build_model
from fastsskd.teachers import load_teacher
from fastsskd.weights import ModelInfo, save_model

SECONDS = 0.96
CLASSES = ("bell", "cat", "dog", "rain")
LENGTHS = (12_000, 15_360, 20_000, 40_000)
"""Of the clips, in turn: one that is looped, one that is as long as a crop, two that have many crops."""


def save_clips(folder, number=22):
    random = np.random.default_rng(0)
    for i in range(number):
        wave = 0.3 * random.standard_normal(LENGTHS[i % 4]) * random.uniform(0.1, 1.0)
        path = folder / CLASSES[i * 7 % 4] / f"{i:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, 16_000)
    return layouts.build(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """22 clips of several lengths in 4 classes."""
    return save_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A model of ours whose head is far from zero, so that its scores differ."""
    model = used_model(build_model, size="nano", num_classes=4, seconds=SECONDS, seed=9)
    with torch.no_grad():
        model.head[1].weight.mul_(20.0)
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_model(path, model.state_dict(), ModelInfo("nano", CLASSES, False, SECONDS, AUDIOSET_MEAN, AUDIOSET_STD))
    return str(path)


def run(clips, out, teacher, *, batch_size=5, **options):
    options = Options((teacher,), **{"seconds": SECONDS, "crops": 3, "seed": 11} | options)
    return teach(clips, out, options, source="clips.manifest", device="cpu", batch_size=batch_size, workers=2)


@pytest.fixture(scope="module")
def stored(clips, model_file, tmp_path_factory):
    """Folder with all four classes of three crops a clip, and the command's result."""
    out = tmp_path_factory.mktemp("answers") / "stored"
    return out, run(clips, out, model_file)


def arrays(out):
    return {path.name: np.load(path) for path in out.glob("*.npy")}


def crop_by_hand(clips, i, crop, *, seed=11):
    """The samples of a clip's crop, from the file and the rule in the docstring of ``Crops``."""
    wave, _ = soundfile.read(clips.path(i), dtype="float32")
    clip_seed = torch.tensor([kernels.derive_seed(seed, crop, i)])
    share = kernels.uniform(clip_seed, 1, stream=100)[0, 0].item()
    length = round(SECONDS * 16_000)
    choices = len(wave) - length + 1 if len(wave) >= length else len(wave)
    return torch.from_numpy(wave[(int(share * choices) + np.arange(length)) % len(wave)])


# ---------------------------------------------------------------------------------------------------- scores in 16 bits


def distribution(rows, classes, multi_label, seed=0):
    logits = 4.0 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) - 2.0
    return logits.sigmoid() if multi_label else logits.softmax(dim=1)


@pytest.mark.parametrize("multi_label", [False, True])
def test_all_classes_come_back_to_within_16_bits(multi_label):
    probs = distribution(200, 9, multi_label)
    log_odds, classes = stored_scores.encode(probs, 9)
    assert log_odds.dtype == np.float16 and log_odds.shape == (200, 9) and classes is None
    back = stored_scores.decode(log_odds, classes, 9, multi_label)
    assert (back - probs).abs().max() < 2.5e-4
    assert ((back - probs).abs() / probs)[probs < 0.01].max() < 0.01
    assert multi_label or (back.sum(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_beyond_the_first_classes_their_mean_comes_back(multi_label, top_k):
    probs = distribution(50, 9, multi_label)
    log_odds, classes = stored_scores.encode(probs, top_k)
    assert log_odds.shape == (50, top_k + 1) and classes.shape == (50, top_k) and classes.dtype == np.int16
    assert log_odds.shape[1] == stored_scores.width(top_k, 9)
    back = stored_scores.decode(log_odds, classes, 9, multi_label)
    for row, (true, found) in enumerate(zip(probs.tolist(), back.tolist(), strict=True)):
        order = sorted(range(9), key=lambda c: -true[c])
        assert classes[row].tolist() == order[:top_k]
        rest = sum(true[c] for c in order[top_k:]) / (9 - top_k)
        expected = [true[c] if c in order[:top_k] else rest for c in range(9)]
        assert found == pytest.approx(expected, abs=3e-4)


def test_certainty_and_impossibility_stay_what_they_are():
    probs = torch.tensor([[1.0, 0.0, 0.0], [1.0 - 1e-7, 1e-7, 0.0]])
    for multi_label in (False, True):
        back = stored_scores.decode(*stored_scores.encode(probs, 3), 3, multi_label)
        assert torch.isfinite(back).all() and (back - probs).abs().max() < 1e-6


def test_what_truncation_does_to_the_loss_is_the_spread_of_the_other_classes_logits():
    """The docstring's claim, computed apart: sum over the others of (p - mean p) (z - mean z)."""
    probs, logits = distribution(40, 30, False), torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    back = stored_scores.decode(*stored_scores.encode(probs, 5), 30, False)
    change = -((back - probs) * logits.log_softmax(dim=1)).sum(dim=1)
    for row in range(40):
        others = sorted(range(30), key=lambda c: -probs[row, c].item())[5:]
        p, z = ([table[row, c].item() for c in others] for table in (probs, logits))
        expected = sum((a - sum(p) / 25) * (b - sum(z) / 25) for a, b in zip(p, z, strict=True))
        assert change[row].item() == pytest.approx(expected, abs=2e-3)


# ------------------------------------------------------------------------------------------------------- tables of rows


def test_a_table_is_what_numpy_reads(tmp_path):
    RowFile.create(tmp_path / "t.npy", (2, 5, 3), np.float16)
    assert (np.load(tmp_path / "t.npy") == np.zeros((2, 5, 3))).all()
    table = RowFile(tmp_path / "t.npy", writable=True)
    assert (table.shape, table.dtype, table.row_bytes) == ((2, 5, 3), np.float16, 6)
    expected = np.zeros((10, 3), np.float16)
    for rows in ([0, 1, 2], [4], [6, 7, 9], []):
        values = np.random.default_rng(len(rows)).random((len(rows), 3)).astype(np.float16)
        table.write(np.array(rows, int), values)
        expected[rows] = values
    table.sync()
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), expected.reshape(2, 5, 3))
    np.testing.assert_array_equal(table.read(np.array([9, 0, 4, 4])), expected[[9, 0, 4, 4]])
    np.testing.assert_array_equal(table.read_all(), expected.reshape(2, 5, 3))
    assert table.read(np.array([], int)).shape == (0, 3)


def test_a_table_that_is_none_is_one_line(tmp_path):
    RowFile.create(tmp_path / "t.npy", (5, 100), np.float32)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "t.npy").read_bytes()[:-1])
    (tmp_path / "text.npy").write_text("not a table at all")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, says in (("cut", "cut short"), ("text", "damaged"), ("empty", "damaged"), ("none", "cannot be read")):
        with pytest.raises(InputError, match=says):
            RowFile(tmp_path / f"{name}.npy")
    table = RowFile(tmp_path / "t.npy")
    os.truncate(tmp_path / "t.npy", 1000)
    with pytest.raises(InputError, match="row 4"):
        table.read(np.array([0, 4]))


# -------------------------------------------------------------------------------------------------- crops in the loader


def heard(clips, *, epochs=1, ranks=1, start=None, **options):
    """Waveform and seed by (epoch, clip), of all ranks."""
    found = {}
    for rank in range(ranks):
        settings = {"batch_size": 4, "seconds": SECONDS, "train": True, "seed": 5, "waveform": True, "workers": 2}
        loader = Loader(clips, rank=rank, world_size=ranks, **settings | options)
        if start:
            loader.load_state_dict({**loader.state_dict(), **start})
        for epoch in range(loader.epoch, epochs):
            for batch in loader:
                for place, i in enumerate(batch.index.tolist()):
                    found[epoch, i] = batch.waveform[place], batch.seed[place].item()
        loader.close()
    return found


def test_crops_come_again_after_a_cycle_and_masks_do_not(clips):
    found = heard(clips, epochs=5, crops=Crops(11, 3, np.arange(len(clips))))
    for (epoch, i), (wave, seed) in found.items():
        assert torch.equal(wave, crop_by_hand(clips, i, epoch % 3)), (epoch, i)
        assert seed == kernels.derive_seed(5, epoch, i)
    assert len(found) == 5 * len(clips)
    assert not torch.equal(found[0, 3][0], found[1, 3][0])


def test_crops_are_the_same_on_any_rank_after_a_resume_and_without_training(clips):
    crops = Crops(11, 3, np.arange(len(clips)))
    one, two = heard(clips, epochs=2, crops=crops), heard(clips, epochs=2, ranks=2, crops=crops)
    assert one.keys() == two.keys() and all(torch.equal(one[at][0], two[at][0]) for at in one)
    resumed = heard(clips, epochs=2, crops=crops, start={"epoch": 1, "position": 8})
    assert len(resumed) == len(clips) - 8 and all(torch.equal(one[at][0], resumed[at][0]) for at in resumed)
    in_order = heard(clips, epochs=1, crops=crops, train=False)
    assert all(torch.equal(one[0, i][0], in_order[0, i][0]) for i in range(len(clips)))


def test_a_clip_keeps_its_crops_in_another_list(clips):
    some = np.array([13, 3, 7])
    found = heard(clips.select(some), crops=Crops(11, 3, some), batch_size=3)
    for place, i in enumerate(some):
        assert torch.equal(found[0, place][0], crop_by_hand(clips, int(i), 0))


# ------------------------------------------------------------------------------------------------------- what is stored


def test_the_answers_are_those_of_the_teacher_to_the_crops(clips, model_file, stored):
    out, result = stored
    found, teacher = arrays(out), load_teacher(model_file)
    assert found.keys() == {"features.npy", "scores.npy", "done.npy"}
    assert found["features.npy"].dtype == found["scores.npy"].dtype == np.float16
    for crop in range(3):
        for i in range(len(clips)):
            logits, features = teacher(crop_by_hand(clips, i, crop)[None])
            probs = 1 / (1 + np.exp(-found["scores.npy"][crop, i].astype(np.float64)))
            np.testing.assert_allclose(probs, logits.softmax(dim=1)[0], atol=3e-4)
            np.testing.assert_allclose(found["features.npy"][crop, i], features[0], rtol=1e-3, atol=1e-5)
    assert (found["done.npy"] == STORED).all() and np.ptp(found["scores.npy"].astype(float), axis=1).min() > 1
    sizes = sum(path.stat().st_size for path in out.iterdir())
    expected = {"clips": 22, "crops": 3, "stored": 66, "bad": 0, "bytes": sizes}
    assert {name: result[name] for name in expected} == expected
    assert result["bytes_per_million_clips"] == 3_000_000 * (2 * 64 + 2 * 4 + 1)


def test_batch_size_and_workers_change_nothing(clips, model_file, stored, tmp_path):
    run(clips, tmp_path / "other", model_file, batch_size=22)
    for name, values in arrays(stored[0]).items():
        np.testing.assert_allclose(arrays(tmp_path / "other")[name], values, rtol=2e-3, atol=1e-4)


def test_a_complete_folder_is_left_as_it_is(clips, model_file, stored, tmp_path):
    shutil.copytree(stored[0], tmp_path / "again")
    before = {path.name: path.read_bytes() for path in stored[0].iterdir()}
    result = run(clips, tmp_path / "again", model_file)
    assert result["stored"] == 66 and result["crops_per_second"] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before


def test_a_teacher_without_the_classes_gives_features(clips, tmp_path, capsys):
    model = build_model("nano", 2, seconds=SECONDS)
    info = ModelInfo("nano", ("a", "b"), False, SECONDS, AUDIOSET_MEAN, AUDIOSET_STD)
    save_model(tmp_path / "model.safetensors", model.state_dict(), info)
    run(clips, tmp_path / "out", str(tmp_path / "model.safetensors"), crops=1)
    assert "features only" in capsys.readouterr().err
    assert arrays(tmp_path / "out").keys() == {"features.npy", "done.npy"}
    answers = StoredAnswers(tmp_path / "out", clips, SECONDS)
    probs, features = answers.answers(0, np.array([3, 1]))
    assert answers.classes == () and probs is None and features.shape == (2, 64)
    module = make_distill(build_model("nano", 4, seconds=SECONDS), teacher=answers)
    (batch, *_) = Loader(clips, batch_size=4, seconds=SECONDS, train=True, crops=answers)
    assert set(module(batch)[1]) == {"label", "regression"}


def test_classes_are_those_of_the_clips_in_their_order(clips, model_file, stored, tmp_path):
    """The teacher's in another order, one under another name, among others."""
    state = load_teacher(model_file).model.state_dict()
    order = [2, 0, 3, 1]
    state["head.1.weight"] = torch.cat([state["head.1.weight"][order], torch.randn(1, 64)])
    state["head.1.bias"] = torch.cat([state["head.1.bias"][order], torch.full((1,), 9.0)])
    info = ModelInfo("nano", ("dog", "bell", "shower", "cat", "owl"), False, SECONDS, AUDIOSET_MEAN, AUDIOSET_STD)
    save_model(tmp_path / "model.safetensors", state, info)
    (tmp_path / "map.json").write_text('{"rain": "shower"}')
    run(clips, tmp_path / "out", str(tmp_path / "model.safetensors"), class_map=str(tmp_path / "map.json"))
    for name, values in arrays(stored[0]).items():
        np.testing.assert_allclose(arrays(tmp_path / "out")[name], values, rtol=2e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ the same losses


class Rounded(FixedTeacher):
    """Answers that 16 bits hold exactly: what is online and what was stored is then the same."""

    def __call__(self, waveform):
        scores, features = super().__call__(waveform / 10)
        log_odds = torch.from_numpy(stored_scores.encode(scores.detach().softmax(dim=1), 4)[0])
        return log_odds.float().sigmoid(), features.detach().half().float()


class Plain(FixedTeacher):
    def __call__(self, waveform):
        return tuple(part.detach() for part in super().__call__(waveform / 10))


def multi(clips):
    """The same clips, of which each may have several classes."""
    return clips.replace(multi_label=True)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize(
    ("kind", "score_kind", "tolerance"), [(Plain, "logits", 2e-3), (Plain, "probs", 2e-3), (Rounded, "probs", 2e-6)]
)
def test_the_loss_is_that_of_the_teacher_itself(clips, tmp_path, monkeypatch, multi_label, kind, score_kind, tolerance):
    """Labels, scores and features, through mixup and augmentation, in every epoch of two cycles."""
    table, teacher = multi(clips) if multi_label else clips, kind(score_kind=score_kind)
    teacher.to = lambda device: teacher
    monkeypatch.setattr(teaching, "load_teacher", lambda *_, **__: teacher)
    (tmp_path / "teacher.pt").write_bytes(b"weights")
    run(table, tmp_path / "out", str(tmp_path / "teacher.pt"), crops=2)
    answers = StoredAnswers(tmp_path / "out", table, SECONDS)
    augmentation = AugmentConfig(mixup=0.5, time_roll=True, noise=0.2)
    model = used_model(build_model, size="nano", num_classes=4, seconds=SECONDS)
    found = {}
    for name, own in (("online", teacher), ("stored", answers)):
        options = {"multi_label": multi_label, "augmentation": augmentation, "gamma": 0.5}
        module = make_distill(model, teacher=own, **options)
        crops = answers if name == "stored" else Crops(11, 2, np.arange(len(table)))
        settings = {"batch_size": 6, "seconds": SECONDS, "train": True, "seed": 5, "workers": 2}
        loader = Loader(table, crops=crops, waveform=name == "online", **settings)
        batches = [batch for _ in range(4) for batch in loader]
        loader.close()
        assert (batches[0].waveform is None) == (name == "stored")
        with torch.no_grad():
            found[name] = [{k: v.item() for k, v in module(batch)[1].items()} for batch in batches]
    assert len(found["online"]) == 16 and set(found["online"][0]) == {"label", "teacher_label", "regression"}
    for online, stored in zip(found["online"], found["stored"], strict=True):
        assert stored == pytest.approx(online, rel=tolerance, abs=tolerance)
        assert stored["label"] == online["label"]


def test_with_fewer_classes_the_loss_is_that_of_the_truncated_scores(clips, model_file, stored, tmp_path):
    run(clips, tmp_path / "out", model_file, top_k=2)
    assert arrays(tmp_path / "out")["classes.npy"].shape == (3, 22, 2)
    every, index = StoredAnswers(stored[0], clips, SECONDS), np.arange(22)
    some = StoredAnswers(tmp_path / "out", clips, SECONDS)
    for epoch in range(4):
        (full, features), (cut, same) = every.answers(epoch, index), some.answers(epoch, index)
        assert torch.equal(features, same)
        best = full.topk(2, dim=1)
        expected = ((1 - best.values.sum(dim=1, keepdim=True)) / 2).expand(-1, 4).scatter(1, best.indices, best.values)
        assert (cut - expected).abs().max() < 5e-4


def test_answers_in_the_batch_are_nothing_to_a_step_without_a_teacher(clips, stored):
    answers = StoredAnswers(stored[0], clips, SECONDS)
    (batch, *_) = Loader(clips, batch_size=4, seconds=SECONDS, train=True, crops=answers)
    module = make_distill(build_model("nano", 4, seconds=SECONDS))
    assert batch.teacher_features is not None and set(module(batch)[1]) == {"label"}


def test_training_on_some_of_the_clips_in_another_order(clips, stored):
    some = np.array([20, 3, 11, 4])
    answers, all_of_them = (StoredAnswers(stored[0], table, SECONDS) for table in (clips.select(some), clips))
    assert np.array_equal(answers.rows, some)
    for mine, theirs in zip(answers.answers(1, np.array([2, 0])), all_of_them.answers(1, some[[2, 0]]), strict=True):
        assert torch.equal(mine, theirs)


# ------------------------------------------------------------------------------------------------------ ended too early


def test_killed_at_any_moment_it_loses_a_block_at_most(clips, model_file, stored, tmp_path, monkeypatch):
    """Before each time that something is brought to the disk, by a signal that leaves no time for anything."""
    # Two batches of 5 fill a block of 8; a pass of 22 clips ends with a smaller one.
    blocks = [0, 10, 20, 22, 32, 42, 44, 54, 64, 66]
    number = 0
    while True:
        out, number = tmp_path / f"{number}", number + 1
        with monkeypatch.context() as patch:
            patch.setattr(teaching, "BLOCK", 8)
            if not killed(lambda out=out: run(clips, out, model_file), number):
                break
        done = arrays(out)["done.npy"] if (out / "teach.json").exists() else np.full((3, 22, 1), NOT_YET)
        before = int((done == STORED).sum())
        assert before >= blocks[max(number - 4, 0) // 3], number  # three to make the folder, and three a block
        for name, values in arrays(out).items() if before else ():
            np.testing.assert_array_equal(
                values[done[..., 0] == STORED], arrays(stored[0])[name][done[..., 0] == STORED]
            )
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(teaching, "ask", count(asked, teaching.ask))
            run(clips, out, model_file)
        assert sum(asked) == 66 - before
        assert all(np.array_equal(values, arrays(stored[0])[name]) for name, values in arrays(out).items())
        StoredAnswers(out, clips, SECONDS)
    assert number == 31


def test_crops_count_as_done_once_their_answers_are_on_the_disk(clips, model_file, tmp_path, monkeypatch):
    events = []
    for name, real in (("write", RowFile.write), ("sync", RowFile.sync)):

        def noted(table, *given, name=name, real=real):
            events.append((name, table.path.stem))
            return real(table, *given)

        monkeypatch.setattr(RowFile, name, noted)
    run(clips, tmp_path / "out", model_file, crops=1, batch_size=22)
    data = [("write", "features"), ("write", "scores"), ("sync", "features"), ("sync", "scores")]
    assert events == [*data, ("write", "done"), ("sync", "done")]


def test_interrupted_or_on_a_full_disk_it_says_how_to_go_on(clips, model_file, stored, tmp_path, monkeypatch):
    real = RowFile.write
    for number, (error, says) in enumerate(
        ((KeyboardInterrupt(), "interrupted: 15 of 66"), (OSError(28, "No space left on device"), "No space left"))
    ):
        calls = 0

        def fails(table, *given, error=error):
            nonlocal calls
            calls += 1
            if calls == 7:  # of the fourth batch, the first one
                raise error
            real(table, *given)

        out = tmp_path / f"{number}"
        monkeypatch.setattr(RowFile, "write", fails)
        with pytest.raises(InputError, match=f"{says}.*run the same command again"):
            run(clips, out, model_file)
        monkeypatch.setattr(RowFile, "write", real)
        run(clips, out, model_file)
        assert all(np.array_equal(values, arrays(stored[0])[name]) for name, values in arrays(out).items())


def count(asked, function):
    def counted(teacher, waveform, *more):
        asked.append(len(waveform))
        return function(teacher, waveform, *more)

    return counted


def killed(work, number) -> bool:
    """Run in a process of its own, which is killed before its file is brought to the disk for the ``number``th time."""
    pid = os.fork()
    if not pid:
        seen, real = 0, os.fsync

        def fsync(descriptor):
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


# ------------------------------------------------------------------------------------------------------------ bad clips


@pytest.fixture
def some_bad(tmp_path, clips):
    """A copy of the clips, two of them cut short."""
    shutil.copytree(clips.root, tmp_path / "clips")
    table = layouts.build(tmp_path / "clips")
    for i in (2, 9):
        os.truncate(table.path(i), 300)
    return table


def test_bad_clips_are_named_and_training_leaves_them_out(clips, some_bad, model_file, tmp_path):
    result = run(some_bad, tmp_path / "out", model_file)
    assert (result["stored"], result["bad"]) == (60, 2)
    done = arrays(tmp_path / "out")["done.npy"][..., 0]
    assert (done[:, [2, 9]] == BAD).all() and (np.delete(done, [2, 9], axis=1) == STORED).all()
    rejected = dict(line.split("\t") for line in (tmp_path / "out/rejected.tsv").read_text().splitlines())
    assert rejected.keys() == {clips.key(2), clips.key(9)} and all("truncated" in why for why in rejected.values())
    # The files are whole again, but what the teacher says of them is still not known.
    answers = StoredAnswers(tmp_path / "out", clips, SECONDS)
    loader = Loader(answers.manifest, batch_size=5, seconds=SECONDS, train=True, crops=answers, seed=3)
    index = [i for _ in range(2) for batch in loader for i in batch.index.tolist()]
    loader.close()
    assert sorted(index) == sorted(2 * [i for i in range(22) if i not in (2, 9)])
    assert loader.skipped == {key: f"has no stored answer: {why}" for key, why in rejected.items()}
    assert not any(clips.bad(i) for i in range(22))


def test_the_same_command_tries_bad_clips_again(clips, some_bad, model_file, stored, tmp_path):
    run(some_bad, tmp_path / "out", model_file)
    shutil.copy(clips.path(9), some_bad.path(9))
    assert run(some_bad, tmp_path / "out", model_file)["bad"] == 1
    lines = (tmp_path / "out/rejected.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [clips.key(2)]
    shutil.copy(clips.path(2), some_bad.path(2))
    run(some_bad, tmp_path / "out", model_file)
    assert all(np.array_equal(values, arrays(stored[0])[name]) for name, values in arrays(tmp_path / "out").items())
    assert not (tmp_path / "out/rejected.tsv").exists()


def test_an_answer_that_is_no_number_is_a_bad_clip(clips, model_file, tmp_path, monkeypatch):
    def wrong(teacher, waveform, *more):
        probs, features = ask(teacher, waveform, *more)
        quiet = waveform.abs().amax(dim=1) < 0.5
        features[quiet, 3] = 1e5
        probs[waveform.abs().amax(dim=1) > 2.5] = float("nan")
        return probs, features

    ask = teaching.ask
    peaks = [[crop_by_hand(clips, i, crop).abs().max().item() for crop in range(3)] for i in range(22)]
    expected = [any(peak < 0.5 or peak > 2.5 for peak in own) for own in peaks]
    assert 0 < sum(expected) < 22
    monkeypatch.setattr(teaching, "ask", wrong)
    assert run(clips, tmp_path / "out", model_file)["bad"] == sum(expected)
    assert "not finite" in (tmp_path / "out/rejected.tsv").read_text()
    marked = StoredAnswers(tmp_path / "out", clips, SECONDS).manifest
    assert [bool(marked.bad(i)) for i in range(22)] == expected


def test_nothing_to_be_heard_is_one_line(some_bad, model_file, tmp_path):
    for i in range(22):
        os.truncate(some_bad.path(i), 300)
    with pytest.raises(InputError, match="none of 22 clips can be heard, most often because: truncated"):
        run(some_bad, tmp_path / "out", model_file)


# -------------------------------------------------------------------------------------------- what does not go together


def test_another_job_s_folder_is_refused(clips, model_file, stored, tmp_path):
    out = tmp_path / "stored"
    shutil.copytree(stored[0], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = tmp_path / "model.safetensors"
    model = build_model("nano", 4, seconds=SECONDS)
    save_model(other, model.state_dict(), ModelInfo("nano", CLASSES, False, SECONDS, AUDIOSET_MEAN, AUDIOSET_STD))
    for table, teacher, options, says in (
        (clips, model_file, {"crops": 2}, "begun with crops = 3, now it is 2"),
        (clips, model_file, {"top_k": 2}, "begun with top_k = 4, now it is 2"),
        (clips, model_file, {"seed": 12}, "begun with seed = 11"),
        (clips, model_file, {"seconds": 0.5}, "begun with seconds = 0.96"),
        (clips, model_file, {"precision": "bf16"}, "begun with precision = fp32"),
        (clips, str(other), {}, "begun with other teacher"),
        (clips.select(np.arange(21)), model_file, {}, "begun with other clips"),
    ):
        with pytest.raises(InputError, match=says):
            run(table, out, teacher, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "files").mkdir()
    (tmp_path / "files/song.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"other files, such as song\.wav"):
        run(clips, tmp_path / "files", model_file)
    with pytest.raises(InputError, match=r"cannot be written .*choose a folder you can write to"):
        run(clips, tmp_path / "files/song.wav", model_file)
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another `fastsskd teach` is writing there"):
        run(clips, out, model_file)
    os.close(descriptor)


def test_a_teacher_of_shorter_clips_is_refused_before_anything_is_written(clips, model_file, tmp_path):
    with pytest.raises(InputError, match="it cannot hear 2 s"):
        run(clips, tmp_path / "out", model_file, seconds=2.0)
    assert not (tmp_path / "out").exists()


def about_changed(**fields):
    def change(out):
        about = json.loads((out / "teach.json").read_text())
        (out / "teach.json").write_text(json.dumps(about | fields))

    return change


def unfinish(out):
    done = np.load(out / "done.npy")
    done[1, 4:9] = NOT_YET
    np.save(out / "done.npy", done)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda out: shutil.rmtree(out), "has no teach.json; give a folder that `fastsskd teach` has filled"),
        (lambda out: (out / "teach.json").write_text("{"), "cannot be read"),
        (lambda out: (out / "teach.json").write_text("[]"), "damaged"),
        (about_changed(crops="3"), "damaged"),
        (about_changed(version=7), "of version 7, not 1"),
        (about_changed(classes=["a", "b", "c", "d"]), "has scores of 4 classes"),
        (about_changed(multi_label=True), "has scores of 4 multi-label classes"),
        (about_changed(crops=4), "its shape is"),
        (about_changed(seconds=1.5), "the teacher heard 1.5 s of a clip, data.seconds is 0.96"),
        (lambda out: os.truncate(out / "features.npy", 700), "cut short"),
        (lambda out: (out / "scores.npy").unlink(), "cannot be read"),
        (lambda out: (out / "clips.manifest").unlink(), "no such manifest"),
        (unfinish, "5 of 66 answers are not there yet; complete it with `fastsskd teach --teacher .* clips.manifest"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(clips, stored, tmp_path, change, says):
    out = tmp_path / "stored"
    shutil.copytree(stored[0], out)
    change(out)
    with pytest.raises(InputError, match=says) as failed:
        StoredAnswers(out, clips, SECONDS)
    assert "\n" not in str(failed.value)


def test_other_clips_are_refused(clips, stored, tmp_path):
    more = save_clips(tmp_path / "more", 24)
    with pytest.raises(InputError, match=r"has no answers for 2 of 24 clips, such as 'cat/23\.wav'"):
        StoredAnswers(stored[0], more, SECONDS)
    moved = more.select(np.arange(24)[[i for i in range(24) if more.key(i) in keys(clips)]])
    StoredAnswers(stored[0], moved, SECONDS)  # in another folder, which is the same
    table = clips.table.set_column(
        clips.table.column_names.index("path"), "path", pa.array([f"other/{i}.wav" for i in range(22)])
    )
    with pytest.raises(InputError, match=r"was the file .*, here it is other/0\.wav"):
        StoredAnswers(stored[0], clips.replace(table=table), SECONDS)


def keys(table):
    return {table.key(i) for i in range(len(table))}


@pytest.mark.parametrize("field", ["teacher", "teacher_classes", "class_map"])
def test_one_teacher_at_a_time(field):
    with pytest.raises(UsageError, match=rf"distill.stored and distill.{field} are both set"):
        from_dict({"distill": {"stored": "answers", field: "x"}})
    assert from_dict({"distill": {"stored": "answers", "labels": False}}).distill.stored == "answers"


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_and_the_one_that_completes_it(clips, model_file, stored, tmp_path, capsys):
    table, out = tmp_path / "my clips.manifest", tmp_path / "answers"
    manifest.save(clips, table)
    options = ["--crops", "3", "--seconds", "0.96", "--seed", "11", "--device", "cpu", "--batch-size", "5"]
    assert cli.main(["teach", "--teacher", model_file, str(table), "--out", str(out), *options]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["stored"], result["clips"], result["bad"]) == (66, 22, 0) and "is complete" in printed.err
    assert all(np.array_equal(values, arrays(stored[0])[name]) for name, values in arrays(out).items())
    unfinish(out)
    with pytest.raises(InputError) as failed:
        StoredAnswers(out, clips, SECONDS)
    program, *arguments = shlex.split(str(failed.value).split("`")[1])
    assert program == "fastsskd" and cli.main(arguments) == 0
    capsys.readouterr()
    StoredAnswers(out, clips, SECONDS)


def test_several_teachers_and_a_list_of_classes(clips, model_file, tmp_path, capsys):
    out, second = tmp_path / "answers", tmp_path / "second.safetensors"
    info = ModelInfo("nano", CLASSES[::-1], False, SECONDS, AUDIOSET_MEAN, AUDIOSET_STD)
    save_model(second, build_model("nano", 4, seconds=SECONDS, seed=4).state_dict(), info)
    command = ["teach", "--teacher", model_file, "--teacher", str(second), str(clips.root), "--seconds", "0.96"]
    assert cli.main([*command, "--out", str(out)]) == 0
    wave, both = crop_by_hand(clips, 5, 0, seed=0)[None], [load_teacher(path) for path in (model_file, second)]
    (one, first), (other, last) = (teacher(wave) for teacher in both)
    expected = (one.softmax(dim=1) + other.softmax(dim=1).flip(1)) / 2
    probs, features = StoredAnswers(out, clips, SECONDS).answers(0, np.array([5]))
    torch.testing.assert_close(probs, expected, atol=4e-4, rtol=0)
    torch.testing.assert_close(features, torch.cat([first, last], dim=1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--seconds", "0"], 2, "--seconds 0.0: choose 0.16 to 60"),
        (["--seconds", "3"], 1, "it cannot hear 3 s"),
        (["--teacher", "nowhere.pth"], 1, "nowhere.pth: no such file"),
        (["--class_map", "nowhere.json"], 1, "nowhere.json: cannot be read"),
    ],
)
def test_wrong_options_are_one_line(clips, model_file, tmp_path, capsys, arguments, code, says):
    command = ["teach", "--teacher", model_file, str(clips.root), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--seconds", "0.96", *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ whole trainings


def test_a_run_with_stored_answers_has_the_losses_of_one_with_the_teacher(training, tones, tmp_path):
    """The tones are as long as a crop, so that every crop of a clip is the same and the teacher hears it in both."""
    table = manifest.load(tones)
    model = used_model(build_model, size="nano", num_classes=2, seconds=SECONDS, seed=9)
    info = ModelInfo("nano", table.classes, False, SECONDS, AUDIOSET_MEAN, AUDIOSET_STD)
    save_model(tmp_path / "model.safetensors", model.state_dict(), info)
    teacher, out = str(tmp_path / "model.safetensors"), tmp_path / "stored"
    teach(table, out, Options((teacher,), crops=2, seconds=SECONDS), source="m", device="cpu", batch_size=8, workers=1)
    options = {"recipe__stages": '["distill"]', "distill__epochs": 3}
    online, _, _ = training.run(tmp_path / "online", tones, distill__teacher=json.dumps(teacher), **options)
    options["distill__stored"] = json.dumps(str(out))
    os.rename(teacher, tmp_path / "gone")
    offline, result, printed = training.run(tmp_path / "offline", tones, **options)
    assert "stored answers with 2 named classes, features of 64" in printed and result["status"] == "complete"
    assert set(offline[0]) == set(online[0]) and {"teacher_label", "regression"} <= set(offline[0])
    for mine, theirs in zip(offline, online, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    two, _, _ = training.run(tmp_path / "two", tones, ranks=2, **options)
    for (step, loss), other in zip(losses(offline).items(), losses(two).values(), strict=True):
        assert other == pytest.approx(loss, abs=2e-5), step
    _, stopped, _ = training.run(
        tmp_path / "again",
        tones,
        expect=1,
        run__checkpoint_every=5,
        harm=[{"function": "fastsskd.checkpoint.save", "calls": [1], "do": "terminate"}],
        **options,
    )
    assert stopped["status"] == "stopped"
    resumed, _, _ = training.run(tmp_path / "again", tones, resume=True, run__checkpoint_every=5, **options)
    assert losses(resumed) == losses(offline)


def test_a_run_without_its_answers_ends_before_it_begins(training, tones, tmp_path):
    options = {"recipe__stages": '["distill"]', "distill__stored": json.dumps(str(tmp_path / "nowhere"))}
    _, _, printed = training.run(tmp_path / "run", tones, expect=1, **options)
    assert "has no teach.json" in printed and "Traceback" not in printed and not (tmp_path / "run").exists()
