"""Reference curves: small tables that say what a run's metrics said, and how another run differs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import line, make_run, shown, ssl_line

from fastsskd import cli
from fastsskd.report import reference
from fastsskd.report.data import read_run
from fastsskd.report.page import page


def test_saved_curves_are_means_of_the_lines(tmp_path):
    run = make_run(tmp_path / "run", ("iter1-ssl",))
    lines = [ssl_line("iter1-ssl", step) for step in range(1, 601)]
    del lines[3]["effective_rank"]
    lines[4]["grad_norm"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(own) + "\n" for own in lines))
    reference.save(read_run(run), tmp_path / "saved")
    found = reference.load(tmp_path / "saved")
    rows = found.stages["iter1-ssl"]
    assert len(rows) == reference.ROWS and list(found.stages) == ["iter1-ssl"]
    for k, row in enumerate(rows):
        own = lines[10 * k : 10 * k + 10]
        assert row["epoch"] == pytest.approx(sum(one["epoch"] for one in own) / 10, rel=1e-3)
        assert row["loss"] == pytest.approx(sum(one["loss"] for one in own) / 10, rel=1e-3)
    assert rows[0]["effective_rank"] == 9 and rows[0]["grad_norm"] == 2  # means of those that are there
    assert not {"clips_per_second", "wait", "seconds"} & rows[0].keys()
    assert (tmp_path / "saved/iter1-ssl.csv").stat().st_size < 20_000


def test_the_same_recipe_has_no_differences_and_another_s_are_named(tmp_path):
    run = make_run(tmp_path / "a")
    reference.save(read_run(run), tmp_path / "saved")
    found = reference.load(tmp_path / "saved")
    twin = make_run(tmp_path / "b", changes={"data": {"workers": 2}}.items())
    assert reference.differences(found, read_run(twin)) == []
    other = make_run(tmp_path / "c", changes={"mask": {"inter_ratio": 0.5}}.items())
    sizes = json.loads((other / "ds_config.json").read_text())
    (other / "ds_config.json").write_text(json.dumps(sizes | {"train_batch_size": 256}))
    assert reference.differences(found, read_run(other)) == [
        "mask.inter_ratio 0.5 (reference: 0.75)",
        "train_batch_size 256 (reference: 24)",
    ]


def test_a_report_lays_them_behind_the_run_s_own(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    reference.save(read_run(run), tmp_path / "saved")
    plain = page(read_run(run))
    assert (
        cli.main(["report", str(run), "--reference", str(tmp_path / "saved"), "--out", str(tmp_path / "p.html")]) == 0
    )
    text = (tmp_path / "p.html").read_text()
    assert "are those of this run" in text and "reference:" not in plain
    # Loss and gradient norm of both stages; explained, own pair found and effective rank of Multi-SSL.
    assert text.count("<path") - plain.count("<path") == 7
    other = make_run(tmp_path / "b", ("iter1-distill",), changes={"distill": {"gamma": 2.0}}.items())
    assert (
        cli.main(["report", str(other), "--reference", str(tmp_path / "saved"), "--out", str(tmp_path / "q.html")]) == 0
    )
    assert "distill.gamma 2.0 (reference: 1.0)" in (tmp_path / "q.html").read_text()
    assert shown(other).row("distill.gamma")[1] == "2.0"


def test_damaged_references_are_errors_of_one_line(tmp_path, capsys):
    run, saved = make_run(tmp_path / "a"), tmp_path / "saved"
    assert cli.main(["report", str(run), "--reference", str(saved)]) == 1
    reference.save(read_run(run), saved)
    (saved / "iter1-ssl.csv").write_text("loss,step\n1,many\n")
    assert cli.main(["report", str(run), "--reference", str(saved)]) == 1
    (saved / "iter1-ssl.csv").write_text("loss\n1\n")
    assert cli.main(["report", str(run), "--reference", str(saved)]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 3 and "makes one" in err[0] and "many" in err[1] and "without an epoch" in err[2]


def test_the_script_keeps_a_run_s_curves_and_draws_them(tmp_path):
    run = make_run(tmp_path / "run")
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks/reference.py"), str(run)]
    done = subprocess.run([*command, "--out", str(tmp_path / "kept")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    names = {file.name for file in (tmp_path / "kept").iterdir()}
    assert names == {"reference.json", "iter1-ssl.csv", "iter1-distill.csv", "losses.png"}
    assert all(name in done.stdout for name in names)
    assert reference.differences(reference.load(tmp_path / "kept"), read_run(run)) == []


def test_few_lines_stay_as_they_are():
    assert reference.thinned([]) == []
    assert reference.thinned([line("iter1-distill", 4)]) == [
        {"step": 4, "epoch": 0.4, "lr": 2.5e-4, "grad_norm": 2.0, "loss": 1.25}
    ]


def test_the_committed_curves_are_those_of_a_run_that_learns():
    """What the page beside them says of the one that everyone can make."""
    kept = Path(__file__).parents[1] / "benchmarks/results/reference"
    assert {path.name for path in kept.iterdir() if path.is_dir()} == {"sounds", "esc10"}
    trained = [f"iter{number}-{kind}" for number in (1, 2, 3) for kind in ("distill", "ssl")]
    assert list(reference.load(kept / "esc10").stages) == [*trained, "teacher"]
    lines = reference.load(kept / "sounds").stages["iter1-ssl"]
    first, last = lines[0], lines[-1]
    assert first["explained_intra"] < 0 < 0.6 < last["explained_intra"]
    assert first["contrast_accuracy_inter"] < 0.2 and last["contrast_accuracy_inter"] > 0.8
    assert last["effective_rank"] > 2 * first["effective_rank"] and last["loss"] < first["loss"] / 4
