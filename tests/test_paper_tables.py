"""The paper's tables: each row is the training that it says, pairs are compared with pairs, numbers by hand."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training import ROOT

from fastsskd import config, manifest
from fastsskd.clip_columns import from_columns
from fastsskd.config import Config, LossConfig, MaskConfig
from fastsskd.pretrain import Pretrain

FAKE = Path(__file__).with_name("fake_train.py")


@pytest.fixture
def script(monkeypatch):
    """A function that imports a benchmark's module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def files(tmp_path):
    """A configuration on a manifest of 6 clips in folds 1 to 3, and what paper_tables is told of it."""
    folds = np.array([1, 1, 2, 2, 3, 3])
    table = from_columns([f"{i}.wav" for i in range(6)], root="/d", labels=folds % 2, classes=("a", "b"), folds=folds)
    manifest.save(table, tmp_path / "m.manifest")
    toml, ds = tmp_path / "c.toml", tmp_path / "ds.json"
    toml.write_text(f"[data]\nmanifest = {json.dumps(str(tmp_path / 'm.manifest'))}\n")
    ds.write_text('{"train_batch_size": 8}')
    return ["--config", str(toml), "--ds_config", str(ds), "--out", str(tmp_path / "out")]


def settings_of(script, row):
    """A row's configuration, on top of one that has a teacher and three iterations."""
    overrides = script("paper_rows").ROWS[row]
    tree = config.to_dict(config.from_dict({"distill": {"teacher": "supervised"}}))
    for text in overrides:
        config._apply_override(tree, text)
    return config.from_dict(tree)


def terms_of(loss: LossConfig) -> set[str]:
    views = ("intra", "inter")
    return {f"{k}_{v}" for k in ("restore", "mse", "kl", "contrast") for v in views if getattr(loss, f"{k}_{v}")}


@pytest.mark.parametrize(
    ("row", "terms", "hog"),
    [
        ("intra-ssr", "restore_intra", False),
        ("intra-ssr-hog", "restore_intra", True),
        ("intra-mse", "restore_intra mse_intra", True),
        ("intra-kl", "restore_intra mse_intra kl_intra", True),
        ("intra-ss", "restore_intra mse_intra kl_intra contrast_intra", True),
        ("inter-ssr-75", "restore_inter", False),
        ("inter-ssr-hog", "restore_inter", True),
        ("inter-kl", "restore_inter mse_inter kl_inter", True),
        ("inter-ss", "restore_inter mse_inter kl_inter contrast_inter", True),
    ],
)
def test_a_row_has_the_terms_that_the_paper_adds_one_by_one(script, row, terms, hog):
    found = settings_of(script, row)
    assert terms_of(found.loss) == set(terms.split()) and found.loss.hog_weight == hog
    assert found.mask.inter_sampling == ("hog" if hog else "uniform")
    assert found.recipe.iterations == 1 and found.recipe.stages == ("ssl", "distill") and not found.distill.teacher


def test_the_other_rows(script):
    base, both = settings_of(script, "base"), settings_of(script, "multi-ssl")
    assert base.recipe.stages == ("distill",) and not base.distill.teacher
    assert terms_of(both.loss) == terms_of(LossConfig()) and both.mask == MaskConfig() and not both.distill.teacher
    assert [settings_of(script, f"inter-ssr-{r}").mask.inter_ratio for r in (45, 85)] == [0.45, 0.85]
    whole = settings_of(script, "iterations")
    assert whole.recipe.iterations == 3 and whole.distill.teacher == "supervised"


def test_every_entry_of_a_table_is_a_row_or_asks_for_a_file(script):
    rows = script("paper_rows")
    for title, entries in rows.TABLES.values():
        labels = [entry.label for entry in entries]
        assert title and len(set(labels)) == len(labels)
        assert {e.row for e in entries} - set(rows.ROWS) <= {"imagenet", "teacher-AST", "teacher-SPFA", "teacher-BEATS"}


def test_tables_share_their_trainings(script, files):
    tables = script("paper_tables")
    _, jobs = tables.jobs_of(tables.parse(["--table", "1", "4", "6", *files, "--seeds", "0", "5", "--folds", "2"]))
    rows = {"base", "intra-ssr", "intra-ssr-hog", "inter-ssr-75", "inter-ssr-hog", "intra-ss", "inter-ss", "multi-ssl"}
    assert set(jobs) == {(row, 2, seed) for row in rows for seed in (0, 5)}
    job = jobs["base", 2, 5]
    assert job.name == "base-fold2-seed5"
    assert job.overrides[-3:] == ("data.eval_folds=[2]", "data.train_folds=[1, 3]", "run.seed=5")


def test_multi_ssl_on_clips_of_its_own_is_shared_by_the_folds(script, files, tmp_path):
    tables = script("paper_tables")
    asked = ["--table", "6", "9", *files, "--set", "data.ssl_manifest=sounds", "--seeds", "0", "5"]
    shared, jobs = tables.jobs_of(tables.parse(asked))
    rows = ("intra-ss", "inter-ss", "multi-ssl")
    assert [job.name for job in shared] == [f"{row}-ssl-seed{seed}" for seed in (0, 5) for row in rows]
    assert len(jobs) == 2 * 3 * (len(rows) + 2)
    for (row, fold, seed), job in jobs.items():
        settings = config.load(files[1], job.overrides)
        init = str(tmp_path / f"out/{row}-ssl-seed{seed}/checkpoints/iter1-ssl") if row in rows else ""
        assert settings.model.init == init and settings.data.eval_folds == (fold,)
        assert settings.recipe.stages == (("ssl", "distill") if row == "iterations" else ("distill",))
    first = config.load(files[1], shared[-1].overrides)
    assert first.recipe.stages == ("ssl",) and not first.model.init and first.run.seed == 5
    assert terms_of(first.loss) == terms_of(settings_of(script, "multi-ssl").loss)


def test_without_folds_a_row_is_trained_once_for_each_seed(script, files):
    tables = script("paper_tables")
    options = ["--table", "1", *files, "--set", "data.eval_manifest=other", "--seeds", "3"]
    _, jobs = tables.jobs_of(tables.parse(options))
    assert set(jobs) == {(row, None, 3) for row in ("base", "intra-ssr", "intra-ssr-hog")}
    assert jobs["base", None, 3].overrides[-1] == "run.seed=3"


def test_teachers_and_starting_weights_are_files(script, files):
    tables = script("paper_tables")
    asked = ["--table", "7", "8", *files, "--teacher", "AST=a b.pth", "--imagenet", "vit.npz", "--folds", "1"]
    _, jobs = tables.jobs_of(tables.parse(asked))
    assert {row for row, _, _ in jobs} == {"multi-ssl", "imagenet", "teacher-AST"}
    assert 'distill.teacher="a b.pth"' in jobs["teacher-AST", 1, 0].overrides
    assert 'model.init="vit.npz"' in jobs["imagenet", 1, 0].overrides
    table = tables.make_table(8, {}, "accuracy")
    assert "not run: --teacher NAME=FILE" in "\n".join(tables.page_of(table))


def result(accuracy, **stages):
    own = {"status": "complete", "seconds": 1.0, "teacher": None, "ensemble": None}
    metrics = {"accuracy": accuracy, "mAP": 0.5}
    return {**own, "iterations": [{"iteration": 1, "metrics": metrics}], "metrics": metrics, **stages}


def test_gains_are_of_pairs(script):
    tables = script("paper_tables")
    values = {"base": (0.5, 0.7, 0.6, 0.8), "intra-ss": (0.6, 0.8, 0.7, 0.9), "inter-ss": (0.7, 0.7, 0.7, 0.7)}
    keys = [(fold, seed) for seed in (0, 1) for fold in (1, 2)]
    results = {
        (row, *key): result(value)
        for row, own in values.items()
        for key, value in zip(keys, own, strict=True)
        if (row, key) != ("inter-ss", (2, 1))
    }
    base, intra, inter, both = tables.make_table(6, results, "accuracy")["rows"]
    assert base["mean"] == pytest.approx(0.65) and base["std_seeds"] == pytest.approx(np.std([0.6, 0.7], ddof=1))
    assert base["over_first"] is None and base["over_before"] is None
    assert intra["over_first"]["mean"] == pytest.approx(0.1) and intra["over_first"]["pairs"] == 4
    assert intra["over_first"]["standard_error"] == pytest.approx(0.0, abs=1e-12)
    gains = np.array([0.2, 0.0, 0.1])  # its fourth training is missing
    assert inter["trainings"] == 3 and inter["std_seeds"] is None
    assert inter["over_first"]["mean"] == pytest.approx(gains.mean())
    assert inter["over_first"]["standard_error"] == pytest.approx(gains.std(ddof=1) / np.sqrt(3))
    assert inter["over_before"]["mean"] == pytest.approx(np.mean([0.1, -0.1, 0.0]))
    assert "mean" not in both and both["trainings"] == 0


def test_iterations_are_stages_of_one_training(script):
    tables = script("paper_tables")
    stages = [{"iteration": i + 1, "metrics": {"accuracy": value}} for i, value in enumerate((0.6, 0.7, 0.65))]
    more = {"teacher": {"metrics": {"accuracy": 0.5}}, "ensemble": {"accuracy": 0.8}}
    rows = tables.make_table(9, {("iterations", 1, 0): result(0.65, iterations=stages, **more)}, "accuracy")["rows"]
    assert [row["mean"] for row in rows] == [0.6, 0.7, 0.65, 0.8, 0.5]
    assert rows[2]["over_before"]["mean"] == pytest.approx(-0.05)


def test_from_the_command_to_the_page(script, files, tmp_path, monkeypatch, capsys):
    """The trainings are a stand-in's; what is asked of them and what is made of them is real."""
    tables = script("paper_tables")
    monkeypatch.setattr(tables, "LAUNCHER", FAKE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert tables.main(["--table", "1", *files, "--folds", "1", "--seeds", "0", "7", "--parallel", "2"]) == 0
    page = (tmp_path / "out/tables.md").read_text()
    assert page in capsys.readouterr().out + "\n" and "| +HOG Weight | 0.377 | 0.544 |" in page
    found = json.loads((tmp_path / "out/tables.json").read_text())["tables"]
    assert [table["metric"] for table in found] == ["accuracy", "mAP"]
    assert all(row["trainings"] == 2 for table in found for row in table["rows"])


def test_wrong_usage(script, files, capsys):
    tables = script("paper_tables")
    for wrong in (["--table", "1"], ["--table", "1", "12", *files], ["--table", "12"]):
        with pytest.raises(SystemExit) as caught:
            tables.parse(wrong)
        assert caught.value.code == 2
    assert tables.main(["--table", "8", *files, "--teacher", "AST"]) == 2
    assert "write it as NAME=FILE" in capsys.readouterr().err


def test_gradients_of_the_terms_add_up(script, make_model, make_batch):
    balance = script("loss_balance")
    loss = LossConfig(alpha=2.0, beta=0.5)
    module = Pretrain(make_model("nano"), loss, MaskConfig())
    batch = make_batch()
    found = balance.gradients(module, batch)
    total, metrics = module(batch)
    assert set(found) == terms_of(loss)
    weighted = sum(module.weight(name) * own["value"] for name, own in found.items())
    assert weighted == pytest.approx(float(total), rel=1e-5)
    assert found["kl_inter"]["value"] == pytest.approx(float(metrics["kl_inter"]), rel=1e-5)
    whole = torch.autograd.grad(total, balance.shared(module), allow_unused=True)
    norm = float(torch.cat([g.flatten() for g in whole]).norm())
    # |g|^2 = g . sum of the parts = |g| sum of |part| cos
    assert sum(own["weighted"] * own["cosine"] for own in found.values()) == pytest.approx(norm, rel=1e-4)


def test_shares_by_hand(script):
    balance = script("loss_balance")
    term = {"value": 1.0, "gradient": 2.0, "cosine": 0.5}
    looks = [{"terms": {"a": term | {"weighted": w}, "b": term | {"weighted": 1.0}}} for w in (1.0, 3.0, 4.0)]
    shares = balance.shares(looks)
    assert shares["a"]["share"] == pytest.approx(0.75) and shares["b"]["share"] == pytest.approx(0.25)
    assert shares["a"]["gradient"] == 2.0


def test_a_whole_balance(script, tmp_path, tones):
    balance = script("loss_balance")
    toml = tmp_path / "c.toml"
    toml.write_text("[model]\nsize = 'nano'\n[data]\nseconds = 0.96\n[ssl]\nepochs = 1\n")
    options = ["--config", str(toml), "--set", f"data.manifest={tones}", "--batch", "4", "--looks", "3"]
    assert balance.main([*options, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/loss_balance.json").read_text())
    assert sum(row["share"] for row in found["table"].values()) == pytest.approx(1.0, abs=0.1)
    assert found["looks"][0]["step"] == 0 and (tmp_path / "out/loss_balance.png").stat().st_size > 10_000
    assert Config().loss.alpha == found["weights"]["alpha"]
    assert SimpleNamespace(**found["looks"][-1]).step == found["clips"] // 4 - 1


def test_figures(script, tmp_path, tones, capsys):
    figures = script("paper_figures")
    options = [str(tones), "--seconds", "0.96", "--out", str(tmp_path)]
    assert figures.main([*options, "--figure", "5", "7", "--clips", "7"]) == 0
    found = json.loads((tmp_path / "figure5.json").read_text())
    assert found["clips"] == 7 and len(found["mean_of_frequency_patch"]) == 8
    x = torch.cat([batch.hog for batch in figures.load(manifest.load(tones), 0.96)])
    assert x.shape == (40, 48)
    own = x[:, :40]  # five of the six patches in time are whole
    weight = torch.exp(-(own - own.mean(1, keepdim=True)).square() / own.var(1, unbiased=False, keepdim=True))
    figures.main([*options, "--figure", "5", "--clips", "40"])
    found = json.loads((tmp_path / "figure5.json").read_text())
    assert found["mean_weight"] == pytest.approx(float(weight.mean()), rel=1e-4)
    assert all((tmp_path / f"figure{number}.png").stat().st_size > 10_000 for number in (5, 7))
    capsys.readouterr()
    assert figures.main([*options, "--figure", "7", "--classes", "whale"]) == 2
    assert "the manifest has high, low" in capsys.readouterr().err
