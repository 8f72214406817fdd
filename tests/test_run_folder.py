"""A run's folder: what a log becomes in its files, what is said, what TensorBoard is shown."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imsave

from fastsskd import config, ds_config
from fastsskd.engine import Log, StagePlan
from fastsskd.run_folder import RunFolder, clip_counts, read_metrics

PLAN = StagePlan("iter1-ssl", 500, 10, 10, 1e-3, "cosine", 1, 0, 10)
STEP = {"loss": 2.0, "restore_inter": 0.4, "variance_inter": 0.8, "positions_inter": 1.2}
STEP |= {"contrast_accuracy_inter": 0.5, "contrast_chance": 0.04}
FEATURES = {"effective_rank": 9.0, "rank_limit": 23.0, "feature_spread": 0.5}


def claimed(out: Path, deepspeed: dict | None = None) -> RunFolder:
    folder = RunFolder(config.from_dict({"run": {"out": str(out)}}), resume=False)
    folder.begin({"iter1-ssl": 500}, deepspeed or {}, {"num_ssl": 8, "num_train": 8, "num_eval": 2})
    folder.begin_stage("iter1-ssl", 0)
    return folder


@pytest.mark.parametrize(
    ("num_ssl", "text"), [(None, "8 training clips,"), (8, "8 training clips,"), (90, "clips (90 for Multi-SSL),")]
)
def test_clips_of_multi_ssl_are_named_where_they_are_others(num_ssl, text):
    named = clip_counts({"num_ssl": num_ssl, "num_train": 8, "num_eval": 2})
    assert text in named and named.endswith(" 2 for evaluation") and ("Multi-SSL" in named) == (num_ssl == 90)


def log(step: int, **metrics: float) -> Log:
    return Log(step, STEP | metrics, 1e-3, 2.0, 240, 1.0, 0.1)


def test_a_log_becomes_a_line_with_shares_and_features(tmp_path):
    folder, written = claimed(tmp_path / "run"), []
    monitor = SimpleNamespace(enabled=True, write_events=written.extend)
    folder.log("iter1-ssl", PLAN, log(10), monitor, FEATURES)
    (line,) = read_metrics(tmp_path / "run")
    assert line["explained_inter"] == pytest.approx(0.5) and line["positions_inter"] == pytest.approx(-0.5)
    assert line["effective_rank"] == 9.0 and "variance_inter" not in line and line["epoch"] == 1.0
    scalars = {name: value for name, value, step in written}
    assert scalars["iter1-ssl/effective_rank"] == 9.0 and scalars["iter1-ssl/explained_inter"] == pytest.approx(0.5)


def test_problems_are_said_once_and_again_in_the_next_stage(tmp_path, capsys):
    folder, ill = claimed(tmp_path / "run"), FEATURES | {"effective_rank": 1.2}
    for step in (10, 20, 30):
        folder.log("iter1-ssl", PLAN, log(step), None, ill)
    assert capsys.readouterr().err.count("iter1-ssl: warning: features collapse: effective rank 1.2 of 23") == 1
    folder.begin_stage("iter1-ssl", 0)
    folder.log("iter1-ssl", PLAN, log(10), None, ill)
    assert "warning" not in capsys.readouterr().err
    folder.log("iter1-ssl", PLAN, log(20), None, ill)
    assert "warning" in capsys.readouterr().err
    # The same loss is expected of a warm-up, and no more after it.
    for step in (30, 40, 210, 220):
        folder.log("iter1-ssl", PLAN, log(step, restore_inter=0.9), None, FEATURES)
    assert capsys.readouterr().err.count("inter view no better than each clip's mean after 220 steps") == 1


def test_pictures_go_to_tensorboard_where_there_is_one(tmp_path):
    folder, shown = claimed(tmp_path / "run"), []
    picture = tmp_path / "picture.png"
    writer = SimpleNamespace(add_image=lambda *given, **options: shown.append((*given, options)))
    monitor = SimpleNamespace(tb_monitor=SimpleNamespace(summary_writer=writer))
    folder.log_picture("iter1-ssl", 10, picture, monitor)  # no clip could be drawn
    imsave(picture, np.zeros((4, 6, 3)))
    folder.log_picture("iter1-ssl", 10, picture, None)
    folder.log_picture("iter1-ssl", 10, picture, SimpleNamespace(tb_monitor=None))
    assert shown == []
    folder.log_picture("iter1-ssl", 10, picture, monitor)
    ((name, image, step, options),) = shown
    assert (name, step, options) == ("iter1-ssl/views", 10, {"dataformats": "HWC"}) and image.shape == (4, 6, 4)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_kept_ds_config_belongs_to_no_folder(tmp_path, elsewhere):
    """A run that is started from it must not write into this run's TensorBoard files."""
    given = {"train_batch_size": 8, "tensorboard": {"enabled": True}}
    if elsewhere:
        given["tensorboard"]["output_path"] = "/logs"
    out = tmp_path / "run"
    claimed(out, ds_config.resolve(given, 1, out / "tensorboard"))
    kept = ds_config.load(out / "ds_config.json")
    assert kept["train_micro_batch_size_per_gpu"] == 8
    expected = {"enabled": True} | ({"output_path": "/logs", "job_name": ""} if elsewhere else {})
    assert kept["tensorboard"] == expected
    again = ds_config.resolve(kept, 1, Path("/runs/again/tensorboard"))
    assert again["tensorboard"]["output_path"] == ("/logs" if elsewhere else "/runs/again/tensorboard")
    assert json.loads((out / "progress.json").read_text())["num_train"] == 8
