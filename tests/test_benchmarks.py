"""The benchmark scripts still run, and compute what they say they compute. No figure is judged here."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from fastsskd import manifest
from fastsskd_kernels import tiles

pytest.importorskip("nvidia.dali")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SAMPLE = {"clips_per_s": 100.0, "cpu_s_per_1000": 10.0, "start_s": 2.0, "first_batch_s": 0.5, "pss_mb": 300.0}


@pytest.fixture
def script(monkeypatch):
    """A function that imports a benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def smoke(name, out, *options, written=None):
    """Run a script briefly; what it wrote as JSON, under its own name unless said."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--smoke", *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / f"{written or name}.json").read_text())


@pytest.mark.slow
def test_smoke_throughput(tmp_path):
    options = ["--generate", "--clips", "16", "--rounds", "1", "--big_gb", "0", "--rows", "0"]
    results = smoke("throughput", tmp_path, *options, "--only", "ours", "lhotse")
    text = json.dumps(results)
    measured = {(row["candidate"], row["source"]) for row in results["rows"]}
    assert {("ours", "flac"), ("ours", "packed"), ("ours", "ogg")} <= measured
    assert all(row["clips_per_s"] > 0 and row["cpu_s_per_1000"] > 0 and row["pss_mb"] > 0 for row in results["rows"])
    if ("lhotse", "flac") not in measured:
        assert results["failures"]["lhotse on flac, 2 workers"].endswith("is not installed")
    assert results["checks"]["ours on packed, 2 workers"]["compared"] >= 4
    assert results["checks"]["ours on packed, 2 workers"]["hog"] is not None
    assert str(BENCHMARKS.parent) not in text and str(tmp_path) not in text and "/tmp" not in text
    assert "# Throughput" in (tmp_path / "throughput.md").read_text()
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


def test_large_shards_and_manifests(tmp_path, script):
    big, data = script("throughput_big"), script("throughput_data")
    packed = small_pack(tmp_path, data)
    asked = []

    def sample(row, source, **limits):
        asked.append(manifest.load(source["manifest"]))
        return SAMPLE | {"rss_mb": 1.0, "file_mb": 1.0}

    options = SimpleNamespace(
        big_gb=4 * Path(packed["shards"][0]).stat().st_size / 1e9, window=0.1, smoke=True, rows=50, rounds=1
    )
    bench = SimpleNamespace(data={"sources": {"packed": packed}}, options=options, sample=sample)
    cold = big.cold(bench, None, tmp_path / "big")
    assert cold["clips"] == 12 and cold["cold"]["clips_per_s"] == 100.0 and cold["random"]["megabytes_per_s"] > 0
    assert 0 <= cold["resident_before_cold"] <= cold["resident_before_warm"] <= 1
    assert len({content(asked[0], i) for i in range(12)}) == 12  # no two clips alike
    keys = [asked[0].key(i) for i in range(12)]
    assert len(set(keys)) == 12
    large = big.large_manifest(bench, None)
    assert large["rows"] == len(asked[2]) == 50 and len(asked[3]) == 3
    assert content(asked[2], 4) == content(asked[3], 1)


def small_pack(folder, data) -> dict:
    """Three clips, packed by our own command."""
    files = [str(folder / f"{number:04d}.wav") for number in range(3)]
    for number, file in enumerate(files):
        rng = np.random.default_rng(number)
        soundfile.write(file, 0.1 * rng.standard_normal(16_000), 16_000, subtype="PCM_16")
    return data._pack(folder, files)


def content(clips: manifest.Manifest, i: int) -> bytes:
    offset, size = clips.extent(i)
    return clips.path(i).read_bytes()[offset : offset + size]


def test_silence_is_cut_out_and_the_rest_stays(script):
    without_silence = script("throughput_data").without_silence
    sound = np.linspace(0.1, 0.9, 50)
    clip = np.concatenate([np.zeros(30), sound, np.zeros(9), sound, np.full(10, 1e-6)])
    np.testing.assert_array_equal(without_silence(clip, 10), clip[30:-10])
    assert len(without_silence(np.zeros(40), 10)) == 0


def test_requirements_follow_from_the_rows(script, tmp_path):
    report = script("throughput_report")
    rates = {
        ("ours", "flac", 2): (1000, 2.0, "ours"),
        ("ours", "packed", 2): (2000, 1.0, "ours"),
        ("ours", "ogg", 2): (100, 10.0, "ours"),
        ("ast", "flac", 2): (150, 13.0, "peer"),
        ("ast", "flac", 3): (200, 14.0, "peer"),
        ("spdl", "ogg", 2): (125, 8.0, "peer"),
        ("decode_ours", "flac", 2): (1250, 1.6, "baseline"),
        ("fbank_only", "memory", 2): (4000, 0.5, "baseline"),
    }
    rows = [
        {"candidate": name, "title": name, "kind": kind, "source": source, "workers": workers}
        | report.summary([SAMPLE | {"clips_per_s": rate, "cpu_s_per_1000": cpu}])
        for (name, source, workers), (rate, cpu, kind) in rates.items()
    ]
    rate = {"clips_per_s": 1000.0, "range": [900.0, 1100.0], "megabytes_per_s": 320.0}
    cold = {"gigabytes": 8, "clips": 10, "resident_before_cold": 0.0, "resident_before_warm": 1.0}
    cold |= {"cold": rate, "warm": rate | {"clips_per_s": 2000.0}, "random": rate, "sequential": rate}
    cold["disk_cpu_ms_per_clip"] = 1.0
    about = {"date": "", "cpu": "", "cores": 2, "python": "", "versions": {}, "load_average": [0.0], "command": ""}
    data = {"origin": "", "clips": 1, "distinct": 1, "flac_bytes": 1, "ogg_clips": 1, "ogg_bytes": 1, "ogg_seconds": 5}
    results = {"machine": about | {"samples_on_an_idle_machine": ""}, "data": data, "rows": rows, "cold": cold}
    results |= {"large_manifest": None, "checks": {}, "failures": {"lhotse on flac": "lhotse is not installed"}}
    results["verdicts"] = report.verdicts(results)
    found = [(row["found"], row["met"]) for row in results["verdicts"]]
    assert found[:4] == [
        (5.0, True),
        (5.0, True),
        (0.8, False),
        (80.0, True),
    ]  # the best number of AST's workers counts
    assert found[4:] == [
        (10.0, False),
        (50.0, False),
        (pytest.approx(2 / 13, abs=1e-3), True),
        (1.25, False),
        (100.0, True),
    ]
    page = report.markdown(results)
    assert "lhotse is not installed" in page and "| **ours** | 1000 |" in page
    report.plot(results, tmp_path / "plot.png")


def test_a_window_is_a_whole_number_of_batches_from_each_worker(script):
    take = script("throughput_sample").take
    batches = (SimpleNamespace(ids=[0] * 32) for _ in range(1000))
    assert take(batches, 0.0, 3, 0)[0] == 0
    next(batches)
    clips, seconds = take(batches, 0.001, 3, 960)
    assert clips % 96 == 0 and 0 < clips <= 960 and seconds > 0


def test_cpu_time_counts_children(script):
    sample = script("throughput_sample")
    before = sample.cpu_seconds()
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert child.pid in sample.family()
        assert sample.cpu_seconds() - before >= 0.25
        child.communicate(b"\n")
    assert sample.cpu_seconds() - before >= 0.25


@pytest.mark.slow
def test_smoke_teach(tmp_path):
    result = smoke("teach", tmp_path, "--student", "nano", "--batch", "2", "--rounds", "1", "--patience", "0")
    assert result["command_bytes_per_million_clips"] == 1_000_000 * (2 * 64 + 2 * 21 + 2 * 20 + 1)
    assert result["bytes_per_million_clips"]["top 20"] == result["command_bytes_per_million_clips"]
    assert result["bytes_per_million_clips"]["all 527"] == 1_000_000 * (2 * 64 + 2 * 527 + 1)
    assert set(result["median_s"]) == {"labels only", "stored answers", "teacher in the step"}
    assert all(value > 0 for value in (*result["median_s"].values(), result["read_microseconds_per_clip"]))
    assert set(result["loss_error"]) == {"teacher_label", "regression"}
    assert "# Stored answers" in (tmp_path / "teach.md").read_text()


def test_intervals_are_held_against_the_truth(tmp_path):
    (row,) = smoke("intervals", tmp_path)["rows"]
    # Eight clips a class: mAP is too high.
    assert row["clips"] == 80 and 0.4 < row["truth"]["mAP"] < row["mean_found"]["mAP"]
    assert all(row[kind]["mAP"] in (0.0, 0.5, 1.0) for kind in ("ours", "percentile"))
    assert "| 80 | 10 | mAP |" in (tmp_path / "intervals.md").read_text()


@pytest.mark.slow
def test_smoke_kernels(tmp_path):
    """Each candidate's output is compared with the references before it is timed."""
    found = smoke("kernels", tmp_path)
    rows = [row for table in ("fbank", "hog", "fused", "threads", "masks") for row in found[table].values()]
    assert len(rows) > 20 and all(0 < row["best_ms"] <= row["median_ms"] for row in rows)
    assert len(found["verdicts"]) == 9 and "## threads" in (tmp_path / "kernels.md").read_text()


@pytest.mark.slow
def test_smoke_matrix_unit(tmp_path, script):
    """What both sides give is compared before it is timed; without the unit the page says that there is none."""
    rows, text = smoke("matrix_unit", tmp_path)["rows"], (tmp_path / "matrix_unit.md").read_text()
    assert len(rows) == (15 if tiles.available() else 0) and ("Not measured" in text) == (not rows)
    assert all(row["ratio"] > 0 and row["ours"]["teraflops"] > 0 for row in rows.values())
    assert len(script("figures_of").figures_of("matrix_unit", {"rows": rows})) == 2 * len(rows)


def test_two_sides_that_differ_are_not_timed(script):
    unit = script("matrix_unit")
    pair = unit.Pair(lambda: torch.ones(3), lambda: torch.ones(3) * 1.02, 1.0)
    with pytest.raises(SystemExit, match=r"a pair: the two sides are 0.02 apart; nothing was timed"):
        pair.check("a pair")


@pytest.mark.slow
def test_smoke_plan_check(tmp_path):
    rows = smoke("plan_check", tmp_path, written="plan")["rows"]
    assert {row["what"] for row in rows} == {"ssl", "distill", "teacher", "bytes"}
    assert all(row["predicted"] > 0 and row["run"] > 0 for row in rows)


@pytest.mark.slow
def test_smoke_train_step(tmp_path):
    found = smoke("train_step", tmp_path, "--size", "nano", "--batch", "2", "--rounds", "1", "--patience", "0")
    rows = found["rows"] | found["labelled"]
    assert [name for name, row in rows.items() if "failed" in row] == []
    # On a GPU ours is the fused attention, and torch's linear maps.
    assert len(rows) == (14 if torch.cuda.is_available() else 16) and all(row["median_s"] > 0 for row in rows.values())
    assert found["labelled"]["labels only"]["share_of_teacher"] == 0.0
    assert "| labels and BEATs |" in (tmp_path / "train_step.md").read_text()
    if not torch.cuda.is_available():  # no step is quicker than all its operations at their best
        assert all(0 < row["spared_s"] <= min(row["seconds"]) for row in rows.values())


def test_a_step_without_neighbours(script, monkeypatch):
    """Three operations, one of them twice a step; a neighbour triples every time but each tenth."""
    timing = script("step_timing")
    steps = iter(range(40))

    class Profile:
        def __init__(self, **options):
            self.slow = 1.0 if next(steps) % 10 == 0 else 3.0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            times = (
                ("mm", [[8, 8]], 1000.0),
                ("mm", [[9, 9]], 200.0),
                ("add", [[8, 8]], 30.0),
                ("add", [[8, 8]], 30.0),
            )
            return [SimpleNamespace(name=n, input_shapes=s, self_cpu_time_total=self.slow * t) for n, s, t in times]

    monkeypatch.setattr(timing.torch.profiler, "profile", Profile)
    monkeypatch.setattr(timing, "seconds_of", lambda work: 0.01)
    operations = timing.Operations()
    assert [operations.time(lambda: None) for _ in range(40)] == [0.01] * 40
    between = 0.01 - 3 * 1260e-6  # of a slow step: the least that was left
    assert operations.seconds() == pytest.approx(between + 1260e-6)
    assert timing.spared([5.0, 4.0, 3.0]) == 3.0 and timing.spared(range(100)) == 5
    products = {("torch", 2, 3, 4): [1.0, 3.0], ("ours", 2, 3, 4): [2.0, 4.0], ("torch", 1, 1, 1): [1.0, 1.0]}
    assert timing.peak_of(products) == 24.0 and timing.peak_of(products, timing.spared) == 48.0


@pytest.mark.slow
def test_smoke_scale(tmp_path, script):
    rows = smoke("scale", tmp_path)["rows"]
    assert [(row["kind"], row["ranks"]) for row in rows] == [("distill", 1), ("distill", 2)]
    assert all(row[run] > 0 for row in rows for run in ("cached", "loader", "end_to_end"))
    assert rows[0]["communication"] == 0 and rows[0]["efficiency"] == 1
    ideal = rows[0]["end_to_end"] * (2 if torch.cuda.is_available() else 1)
    assert rows[1]["efficiency"] == pytest.approx(rows[1]["end_to_end"] / ideal)
    assert "| labels | 2 |" in (tmp_path / "scale.md").read_text() and (tmp_path / "scale.png").stat().st_size > 5_000
    assert script("scale").rank_counts(6) == [1, 2, 4, 6] and script("scale").rank_counts(8) == [1, 2, 4, 8]


@pytest.mark.slow
def test_smoke_scenarios(tmp_path):
    found = smoke("scenarios", tmp_path)
    rows = found["rows"]
    assert [len(row["found"]) for row in rows] == [1, 1] and all(row["end_to_end"] > 0 for row in rows)
    assert rows[1]["found"][0][1] == "teacher" and rows[1]["predicted"] > 1 and rows[1]["measured"] > 0
    assert found["verdicts"][0]["found"] == 50 * sum(row["right"][0] for row in rows)
    assert f"| {rows[0]['name']} |" in (tmp_path / "scenarios.md").read_text()


def test_gains_are_those_of_the_best_advice(script):
    scenarios = script("scenarios")
    situation = scenarios.Situation("x", "LOADER-BOUND", ("pack",))

    def sample(word, *advice):
        given = [{"key": key, "gain": gain, "tried": {"value": tried}} for key, gain, tried in advice]
        rate = {"end_to_end": {"value": 5.0}}
        return {"verdict": word, "advice": given, "clips_per_second": rate, "seconds": 1.0, "setup": 2.0}

    samples = [
        sample("LOADER-BOUND", ("pack", 4.0, 3.0), ("threads", 2.0, 1.5)),
        sample("LOADER-BOUND", ("threads", 2.0, 1.5), ("pack", 6.0, 5.0)),
        sample("BALANCED"),
    ]
    row = scenarios.row_of(situation, samples)
    assert row["right"] == [True, False, False] and row["found"][2] == ("BALANCED", "none")
    assert (row["predicted"], row["measured"], row["seconds"]) == (5.0, 4.0, 3.0)


@pytest.mark.slow
def test_smoke_live(tmp_path):
    """In a process of its own; every piece was called and takes time, and the sum is that of the pieces."""
    found = smoke("live", tmp_path)
    assert len(found["rows"]) == 4 and all(row["seconds"] > 0 for row in found["rows"].values())
    shares = [100 * row["seconds"] * row["times"] / found["step"] for row in found["rows"].values()]
    assert found["percent"] == pytest.approx(sum(shares)) and found["logs"] == 6


def test_what_fits_into_the_budget(script):
    run_all = script("run_all")
    scripts = tuple(run_all.Script(name, f"{name}.py", minutes) for name, minutes in (("a", 6), ("b", 25), ("c", 3)))
    names = [[s.name for s in part] for part in run_all.choose(scripts, 10)]
    assert names == [["a", "c"], ["b"]]
    assert [s.name for s in run_all.choose(scripts, 34)[0]] == ["a", "b", "c"]


def test_every_benchmark_of_the_page_has_a_smoke_run(script):
    """The tests above run them."""
    run_all = script("run_all")
    for item in run_all.SCRIPTS:
        assert '"--smoke"' in (BENCHMARKS / item.file).read_text()
        assert item.name in run_all.figures_of.__globals__["READERS"] or item.name == "intervals"


def test_every_benchmark_opens_with_its_last_result(script):
    """That of the file beside it, by its date."""
    for item in script("run_all").SCRIPTS:
        text = ast.get_docstring(ast.parse((BENCHMARKS / item.file).read_text()))
        written = json.loads((BENCHMARKS / "results" / f"{item.name}.json").read_text())["machine"]["date"].split()[0]
        assert f"\nLast result, {written}: " in text, item.file
        assert text.split("\n")[0].endswith("?") and f"python benchmarks/{item.file}" in text


def test_a_change_is_one_that_the_samples_cannot_explain(script):
    figures = script("figures_of")
    old = {
        "a": figures.of_samples([1.0, 1.1, 0.9], "s", False),
        "b": figures.of_samples([100.0, 102.0, 98.0], "clips/s", True),
        "c": figures.of_samples([1.0], "s", False),
        "gone": figures.of_samples([1.0], "s", False),
    }
    new = {
        "a": figures.of_samples([1.3, 1.05, 1.4], "s", False),  # ranges meet
        "b": figures.of_samples([80.0, 81.0, 79.0], "clips/s", True),
        "c": figures.of_samples([0.97], "s", False),  # apart, but within the noise
    }
    rows = figures.compare(old, new)
    assert [(row["name"], row["verdict"]) for row in rows] == [("a", "same"), ("b", "worse"), ("c", "same")]
    assert rows[1]["change"] == pytest.approx(-0.2)
    new["c"] = figures.of_samples([0.9], "s", False)
    assert figures.compare(old, new)[2]["verdict"] == "better"


def test_a_faster_machine_is_no_change(script):
    """Three others and one of ours became twice as fast, another of ours did not."""
    figures = script("figures_of")
    before = dict.fromkeys(("peer", "other peer", "baseline", "ours", "ours too"), 100.0)
    now = before | {"peer": 200.0, "other peer": 190.0, "baseline": 210.0, "ours": 200.0}

    def made(values: dict, ours: bool) -> dict:
        return {n: figures.Figure(v, v, v, "clips/s", True, ours or n.startswith("ours")) for n, v in values.items()}

    rows = {row["name"]: row for row in figures.compare(made(before, False), made(now, False))}
    assert [rows[name]["verdict"] for name in ("peer", "ours", "ours too")] == ["same", "same", "worse"]
    assert rows["ours too"]["change"] == pytest.approx(-0.5) and rows["ours too"]["machine"] == 2.0
    rows = {row["name"]: row for row in figures.compare(made(before, True), made(now, True))}
    assert rows["ours"]["verdict"] == "better" and rows["ours"]["machine"] == 1.0  # nobody can tell


def test_committed_results_are_read_and_compared(script, tmp_path, capsys):
    run_all = script("run_all")
    results = run_all.read(BENCHMARKS / "results")
    counts = {name: len(run_all.figures_of(name, result)) for name, result in results.items()}
    assert counts["kernels"] > 20 and counts["throughput"] > 30 and counts["teach"] == 3 and counts["plan"] == 16
    slower = json.loads((BENCHMARKS / "results/teach.json").read_text())
    slower["seconds"]["stored answers"] = [10 * value for value in slower["seconds"]["stored answers"]]
    (tmp_path / "teach.json").write_text(json.dumps(slower))
    options = ["--only", "--out", str(tmp_path), "--against", str(BENCHMARKS / "results")]
    assert run_all.main(options) == 0 and run_all.main([*options, "--fail"]) == 1
    page = (tmp_path / "all.md").read_text()
    assert "3 figures compared, 1 changed" in page and "| teach: stored answers |" in page
    assert page in capsys.readouterr().out


@pytest.mark.slow
def test_smoke_gpu(tmp_path):
    """All parts but the kernels, which have a test above; here on whatever there is."""
    parts = smoke("gpu", tmp_path)["parts"]
    assert set(parts) == {"training step", "from packed", "from flac", "from ogg"}
    for name in ("packed", "flac", "ogg"):
        row = parts[f"from {name}"]
        assert row["steps"] == 12 and row["clips_per_s"] > 0 and 0 <= row["wait"] < 1
    assert "| from ogg |" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_the_gpu_script_says_so(script, monkeypatch, capsys):
    gpu = script("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        gpu.main([])
    assert caught.value.code == 2 and "torch finds no GPU here" in capsys.readouterr().err
