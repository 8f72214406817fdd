"""The page of a run: from folders in every state a run can be in, as HTML, and as a browser shows it."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fastsskd import cli, config, durable
from fastsskd.evaluation import score_file
from fastsskd.evaluation.metrics import classification_metrics
from fastsskd.report import run_table as report
from fastsskd.report.data import hardest, numbers, read_run
from fastsskd.report.page import page

CLASSES = ("dog", "rain & wind", "<b>saw</b>")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360f8cf500f0003860180"
    "5a34d8150000000049454e44ae426082"
)
VOID = {"meta", "link", "img", "br", "line", "rect"}


# ------------------------------------------------------------------------------------------------------ made-up runs


def line(stage: str, step: int, per_epoch: int = 10, **more) -> dict:
    speed = {"clips_per_second": 100.0, "clips": 24, "seconds": 0.24, "wait": 0.125}
    base = {"stage": stage, "step": step, "epoch": step / per_epoch, "lr": 1e-3 / step, "grad_norm": 2.0, **speed}
    return base | {"loss": 5.0 / step} | more


def ssl_line(stage: str, step: int, **more) -> dict:
    terms = {
        f"{kind}_{view}": 1.0 / step for kind in ("restore", "mse", "kl", "contrast") for view in ("intra", "inter")
    }
    health = {"feature_std": 0.6, "effective_rank": 9.0, "rank_limit": 23.0, "feature_spread": 0.5}
    health |= {"contrast_accuracy_intra": 0.9, "contrast_accuracy_inter": 0.5, "contrast_chance": 1 / 24}
    health |= {"explained_intra": 0.8, "explained_inter": 0.3, "positions_intra": -2.0, "positions_inter": -2.0}
    return line(stage, step, **terms | health | more)


def scores(classes=CLASSES, clips: int = 30, several: bool = False) -> score_file.ClipScores:
    random = np.random.default_rng(0)
    probs = random.random((clips, len(classes))).astype(np.float32)
    label = (
        (random.random(probs.shape) < 0.1).astype(np.uint8) if several else random.integers(len(classes), size=clips)
    )
    return score_file.ClipScores(np.array([f"clip{k}" for k in range(clips)]), label, probs, tuple(classes))


def rated(own: score_file.ClipScores) -> dict:
    return classification_metrics(own.probs, own.label, own.classes) | {"weights": {"select": "last", "epochs": []}}


def make_run(out: Path, stages=("iter1-ssl", "iter1-distill"), *, result=True, done=None, own=None, changes=()) -> Path:
    """A run's folder with ``stages`` of four epochs, those of ``done`` (default: all) ended."""
    out.mkdir(parents=True)
    own = own or scores()
    settings = config.from_dict({"run": {"out": str(out), "seed": 7}, "ssl": {"warmup_epochs": 1.0}, **dict(changes)})
    (out / "config.toml").write_text(config.to_toml(settings), encoding="utf-8")
    sizes = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 12, "gradient_accumulation_steps": 1}
    (out / "ds_config.json").write_text(json.dumps(sizes))
    lines, finished = [], {}
    for stage in stages:
        is_ssl = stage.endswith("-ssl")
        lines += [(ssl_line if is_ssl else line)(stage, step) for step in range(2, 41, 2)]
        summary = {"losses": {"loss": 0.25}, "clips_per_second": 100.0, "wait": 0.125, "seconds": 4000.0}
        metrics = None if is_ssl else rated(own)
        if done is None or stage in done:
            finished[stage] = {"metrics": metrics, **summary}
            if is_ssl:
                (out / "plots").mkdir(exist_ok=True)
                for name in ("-epoch002", ""):
                    (out / "plots" / f"{stage}-views{name}.png").write_bytes(PIXEL)
            else:
                score_file.save(out / "scores" / f"{stage}.npz", own)
    (out / "metrics.jsonl").write_text("".join(json.dumps(own) + "\n" for own in lines))
    (out / "progress.json").write_text(json.dumps({"stages": finished, "num_train": 240, "num_eval": 30}))
    if result:
        facts = {
            "status": "complete",
            "ensemble": None,
            "skipped": {},
            "seconds": 8000.0,
            "versions": {"torch": "2.11"},
        }
        (out / "result.json").write_text(json.dumps(facts))
    return out


class Page(HTMLParser):
    """Fails on tags that are not closed in order, and collects what is loaded, titles, texts and cells."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.loaded, self.rows, self.texts, self.tags = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "data", "srcset", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)


def shown(run: Path) -> Page:
    found = Page(page(read_run(run)))
    assert all(value.startswith("data:") for value in found.loaded)
    assert not {"script", "iframe", "object"} & set(found.tags)
    return found


# ------------------------------------------------------------------------------------------------ states of a run


def test_a_complete_run_shows_all_it_has(tmp_path):
    run = make_run(tmp_path / "whole", ("teacher", "iter2-distill", "iter2-ssl", "iter1-ssl", "iter1-distill"))
    found = shown(run)
    text = " ".join(found.texts)
    titles = [t for t in found.texts if t in ("teacher", "iter1-ssl", "iter1-distill", "iter2-ssl", "iter2-distill")]
    assert titles[-5:] == ["teacher", "iter1-ssl", "iter1-distill", "iter2-ssl", "iter2-distill"]
    own = rated(scores())
    expected = [f"{own[name]:.3f}" for name in ("accuracy", "mAP", "AUC")]
    assert found.row("iter2-distill")[:6] == ["iter2-distill", "4", "0.250", *expected]
    assert found.row("iter2-distill")[-3:] == ["100.0", "12.5", "67 min"]
    assert found.row("iter1-ssl")[3:7] == ["-"] * 4
    for name in ("Effective rank", "variance explained", "find their own pair", "Gradient norm", "Learning rate"):
        assert name in text
    assert found.tags.count("img") == 4 and "after epoch 2" in text  # two of each Multi-SSL stage
    assert "240 training clips, 30 for evaluation" in text and "complete" in found.texts
    assert found.row("seed")[1] == "7" and found.row("torch")[1] == "2.11"
    assert f"--config {run}/config.toml" in text and "on 2 rank(s)" in text
    assert "None were found." in text and found.row("run.seed")[1] == "7"


@pytest.mark.parametrize("stages", [("iter1-ssl",), ("iter1-distill",), ("iter1-distill", "iter2-distill")])
def test_stages_of_one_kind(tmp_path, stages):
    text = " ".join(shown(make_run(tmp_path / "some", stages)).texts)
    assert ("Effective rank" in text) == (stages == ("iter1-ssl",))
    assert ("Hardest clips" in text) == (stages != ("iter1-ssl",))


def test_an_unfinished_run_says_when_it_was_last_heard_of(tmp_path):
    run = make_run(tmp_path / "going", result=False, done=("iter1-ssl",))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "iter1-distill", "ste')  # killed while it wrote
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    found = shown(run)
    assert "unfinished" in found.texts and re.search(r"it last wrote \d{4} days ago", " ".join(found.texts))
    assert found.row("iter1-distill (unfinished)")[1:4] == ["4", "0.125", "-"]


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_a_run_that_ended_early_says_why(tmp_path, status):
    run = make_run(tmp_path / "early", result=False, done=())
    (run / "result.json").write_text(json.dumps({"status": status, "reason": "the disk <is> full"}))
    text = " ".join(shown(run).texts)
    assert status in text and "the disk <is> full" in text


def test_a_run_that_logged_nothing_yet(tmp_path):
    run = make_run(tmp_path / "new", (), result=False)
    (run / "metrics.jsonl").unlink()
    (run / "progress.json").unlink()
    assert "Nothing was logged yet." in " ".join(shown(run).texts)


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "torn")
    (run / "result.json").write_text('{"status": ')
    (run / "scores/iter1-distill.npz").write_bytes(b"PK\x03\x04 not all of it")
    text = " ".join(shown(run).texts)
    assert "cannot be read: result.json" in text and "scores/iter1-distill.npz" in text
    assert "Classes, iter1-distill" in text and "Mistakes" not in text


def test_a_configuration_of_another_version_is_shown_as_it_is(tmp_path):
    run = make_run(tmp_path / "other", changes={"model": {"size": "nano"}}.items())
    with open(run / "config.toml", "a") as file:
        file.write("[future]\nfield = 3\n")
    found = shown(run)
    assert found.row("future.field")[1] == "3" and found.row("model.size")[1] == '"nano"'
    assert not any(row[:1] == ["model.attention"] for row in found.rows)  # its default


def test_what_is_no_run_is_an_error_of_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "not the folder of a run" in err[0] and "no such folder" in err[1]


# --------------------------------------------------------------------------------------------------------- what it says


def test_problems_of_pretraining_and_of_the_data_are_told(tmp_path):
    run = make_run(tmp_path / "ill")
    lines = [ssl_line("iter1-ssl", step, effective_rank=1.1) for step in range(10, 60, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(own) + "\n" for own in lines))
    (run / "skipped.tsv").write_text("a\tsilent\nb\tsilent\nc\ttruncated\n")
    bad = {"stage": "iter1-ssl", "step": 3, "keys": ["x", "y"], "loss": "nan"}
    (run / "bad_steps.jsonl").write_text(json.dumps(bad) + "\n" + json.dumps({**bad, "rank": 1}) + "\n")
    found = shown(run)
    text = " ".join(found.texts)
    assert "iter1-ssl, step 20: features collapse: effective rank 1.1 of 23" in text
    assert "3 clip(s) could not be used" in text and found.row("silent")[1] == "2" and found.row("c")[1] == "truncated"
    assert "1 step(s) were skipped" in text and ["iter1-ssl", "3", "nan", "x, y"] in found.rows


def test_a_reconstruction_that_learns_nothing_is_drawn_all_the_same(tmp_path):
    """The first steps of one that learns are far below what follows, and are left out; here nothing follows."""
    for last, name in ((0.4, "learns"), (-1.5, "stuck")):
        run = make_run(tmp_path / name, ("iter1-ssl",))
        lines = [ssl_line("iter1-ssl", step, explained_inter=-1.6) for step in range(10, 60, 10)]
        lines[-1]["explained_inter"] = last
        (run / "metrics.jsonl").write_text("".join(json.dumps(own) + "\n" for own in lines))
        figure = page(read_run(run)).split("<figcaption>Reconstruction")[1].split("</figure>")[0]
        points = [len(re.findall("[ML]", d)) for d in re.findall(r'<path d="([^"]*)"', figure)]
        assert points == ([5, 1] if last > 0 else [5, 5, 5, 5])


def test_names_with_markup_stay_text(tmp_path):
    run = make_run(tmp_path / "a<i>b")
    (run / "skipped.tsv").write_text("<script>alert(1)</script>\t\"&' <img src=x>\n")
    found = shown(run)
    assert (
        "<b>saw</b>" in found.row("<b>saw</b>")[0] and found.row("<script>alert(1)</script>")[1] == "\"&' <img src=x>"
    )


def test_hardest_clips_and_confusion_are_of_the_scores(tmp_path):
    label = np.array([0, 0, 1, 2, 2])
    probs = np.array([[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.6, 0.1, 0.3], [0, 0.05, 0.95]], np.float32)
    own = score_file.ClipScores(np.array(list("abcde")), label, probs, CLASSES)
    assert [clip["key"] for clip in hardest(own, 2)] == ["b", "d"]
    assert hardest(own, 1)[0] == {
        "key": "b",
        "labels": ["dog"],
        "prob": pytest.approx(0.2),
        "guessed": "rain & wind",
        "guessed_prob": pytest.approx(0.7),
    }
    run = make_run(tmp_path / "mistakes", own=own)
    found = shown(run)
    assert found.row("b")[1:] == ["dog", "0.200", "rain & wind", "0.700"]
    assert "1 of 2 clips of dog taken for rain & wind" in found.texts
    assert ["dog", "rain & wind", "1", "50"] in found.rows


def test_the_hardest_of_several_labels_counts_their_mean():
    label = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], np.uint8)
    probs = np.array([[0.1, 0.3, 0.9], [0, 0.1, 0], [0, 0, 0]], np.float32)
    found = hardest(score_file.ClipScores(np.array(list("abc")), label, probs, CLASSES))
    assert [(clip["key"], clip["labels"]) for clip in found] == [("b", ["rain & wind"]), ("a", ["dog", "rain & wind"])]
    assert found[1]["prob"] == pytest.approx(0.2) and found[1]["guessed"] == "<b>saw</b>"


def test_527_classes_with_several_labels_are_folded(tmp_path):
    own = scores([f"class {k}" for k in range(527)], clips=60, several=True)
    run = make_run(tmp_path / "many", own=own)
    found = shown(run)
    rows = [row for row in found.rows if row[0].startswith("class ")]
    assert len(rows) == 10 + 10 + 527 and "All 527 classes" in found.texts
    worst = [float(row[2]) for row in rows[20:] if row[2] != "-"]
    assert worst == sorted(worst) and rows[0] == rows[20]
    assert "taken for" not in found.texts
    assert len(page(read_run(run))) < 500_000


def test_the_numbers_are_json(tmp_path, capsys):
    run = make_run(tmp_path / "numbers")
    assert cli.main(["report", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(numbers(read_run(run)))) and not (run / report.PAGE).exists()
    assert told["stages"][1]["metrics"]["mAP"] == rated(scores())["mAP"] and told["status"] == "complete"
    assert told["stages"][0]["step"] == 40 and len(told["hardest"]) == 20


def test_the_command_writes_one_file_and_says_where(tmp_path, capsys):
    run = make_run(tmp_path / "command")
    assert cli.main(["report", str(run)]) == 0
    assert (run / report.PAGE).read_text() == page(read_run(run))
    assert cli.main(["report", str(run), "--out", str(tmp_path / "deep/er.html")]) == 0
    assert str(tmp_path / "deep/er.html") in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["report", str(run), "--out", str(blocked / "page.html")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_that_cannot_be_written_does_not_spoil_a_run(tmp_path, monkeypatch):
    run = make_run(tmp_path / "full")
    result = json.loads((run / "result.json").read_text())
    ssl = {"metrics": None, "losses": {"loss": 1.0}, "health": {"effective_rank": 9.4, "rank_limit": 23.0}}
    result |= {"teacher": None, "iterations": [{"iteration": 1, "ssl": ssl}], "num_train": 1, "num_eval": 1}
    result["metrics"] = None
    shown = report.show(run, result)
    assert f"The whole report: {run / report.PAGE}" in shown and "effective rank 9.4 of 23" in shown

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write_text", full)
    assert "report.html could not be written" in report.show(run, result)


# --------------------------------------------------------------------------------------------------------------- folds


def make_folds(out: Path) -> Path:
    """What launch/kfold.py leaves of two folds and one seed."""
    runs, own = [], scores(clips=20)
    for fold, part in ((1, slice(0, 10)), (2, slice(10, 20))):
        half = score_file.ClipScores(own.key[part], own.label[part], own.probs[part], own.classes)
        folder = out / f"fold{fold}-seed0"
        score_file.save(folder / "scores/iter1-distill.npz", half)
        skipped = {"clip99": "silent"} if fold == 1 else {}
        runs.append({"fold": fold, "seed": 0, "folder": folder.name, "num_train": 10, "skipped": skipped})
    spread = {"mean": 0.5, "std_folds": 0.125, "std_seeds": None, "folds": {"1": 0.375, "2": 0.625}}
    spread |= {"over_before": None, "over_first": {"mean": 0.25, "standard_error": 0.125, "better": 2, "pairs": 2}}
    row = {"accuracy": spread, "mAP": spread, "AUC": None, "pooled": {"accuracy": 0.4375, "mAP": None}}
    row |= {"num_clips": 20, "num_classes": 3}
    found = {"folds": [1, 2], "seeds": [0], "rows": {"iter1-distill": row, "ensemble": row}, "runs": runs}
    (out / "kfold.json").write_text(json.dumps(found | {"weights": "those of the last epoch"}))
    return out


def test_a_cross_validation_has_a_page_too(tmp_path, capsys):
    out = make_folds(tmp_path / "folds")
    assert cli.main(["report", str(out)]) == 0
    found = Page((out / report.PAGE).read_text())
    row = ["iter1-distill", "0.500", "0.125", "-", "0.438", "-", "+0.250 ± 0.125", "0.375", "0.625"]
    assert found.row("iter1-distill") == row
    text = " ".join(found.texts)
    assert "2 folds, 1 seed(s), 20 clips, 3 classes; weights: those of the last epoch" in text
    assert (
        "1 clip(s) could not be used" in text
        and "Hardest clips" in text
        and "AUC" not in [t for t in found.texts if t in ("accuracy", "mAP", "AUC") and found.texts.index(t) < 10]
    )
    own = rated(scores(clips=20))["per_class"]["dog"]
    assert found.row("dog")[:3] == ["dog", str(own["num_clips"]), f"{own['AP']:.3f}"]
    (out / "kfold.json").write_text("[]")
    assert cli.main(["report", str(out)]) == 1
    assert "run launch/kfold.py again" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- browser

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")


def browse(text: str, width: int, folder: Path) -> tuple[dict, list[str]]:
    """Show a page in a frame, as narrow as a telephone's if wanted; what it measured, what the console heard."""
    (folder / "page.html").write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    frame = f'<iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>'
    listen = '<script>addEventListener("message", (heard) => { document.title = heard.data; });</script>'
    (folder / "frame.html").write_text(f"<!DOCTYPE html><html><head>{listen}</head><body>{frame}</body></html>")
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--hide-scrollbars",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    command += ["--virtual-time-budget=4000", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout).group(1)))
    return measured, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# Run in the page, for the test alone: what sticks out of the window, curves that leave their frame, empty boxes.
MEASURE = """<script>addEventListener("load", () => {
  const out = {wide: document.documentElement.scrollWidth, window: innerWidth, outside: 0, flat: 0, small: 0};
  for (const svg of document.querySelectorAll(".chart > svg")) {
    const frame = svg.getBoundingClientRect();
    if (frame.height < 100) out.flat++;
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 4 || box.bottom > frame.bottom + 1) out.outside++;
      if (Math.min(box.width, box.height) < 6) out.small++;
    }
    for (const path of svg.querySelectorAll("path")) {
      const box = path.getBBox();
      if (box.x < 0 || box.y < 0 || box.x + box.width > 400 || box.y + box.height > 240) out.outside++;
    }
  }
  out.charts = document.querySelectorAll(".chart > svg").length;
  parent.postMessage(JSON.stringify(out), "*");
});</script>"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_complaint_and_without_scrolling_sideways(tmp_path, width):
    own = scores([f"a class with a long name, number {k}" for k in range(40)], clips=400)
    run = make_run(tmp_path / "run", ("iter1-ssl", "iter1-distill"), own=own)
    (run / "skipped.tsv").write_text(f"{'very-long-name' * 20}\t{'reason' * 40}\n")
    found, complaints = browse(page(read_run(run)), width, tmp_path)
    assert complaints == []
    assert found["window"] == width and found["charts"] == 14
    assert found["wide"] <= width
    assert found["outside"] == found["flat"] == found["small"] == 0


@needs_browser
def test_the_browser_would_complain_and_the_measure_would_notice(tmp_path):
    """Otherwise the test above could not fail."""
    wide = '<!DOCTYPE html><html><body><div style="width:2000px">x</div><img src="file:///nowhere.png">'
    found, complaints = browse(wide + "<script>nothing.there()</script></body></html>", 390, tmp_path)
    assert complaints and found["wide"] >= 2000
