"""Several runs: each once, resumed, apart from each other's failures, and none left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training import BASE, ROOT

from fastsskd.errors import InputError, UsageError
from fastsskd.many_runs import Job, JobsFailed, run_many

FAKE = Path(__file__).with_name("fake_train.py")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs jobs with a stand-in for train.py."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    toml, ds = tmp_path / "c.toml", tmp_path / "ds.json"
    toml.write_text('[data]\nmanifest = "m"\n')
    ds.write_text('{"train_batch_size": 8}')

    def call(*jobs, **options):
        files = {"config": toml, "ds_config": ds, "out": tmp_path / "out", "launcher": FAKE}
        return run_many([Job(*job) for job in jobs], **{**files, **options})

    call.files = toml, ds
    return call


def calls(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_each_job_runs_once_and_results_come_in_the_order_asked(run, tmp_path, capfd):
    jobs = [("b", ("run.seed=10",)), ("a",)]
    assert list(run(*jobs)) == ["b", "a"]
    assert "a done in" in (printed := capfd.readouterr().err) and "[2 of 2 jobs done, 0 running]" in printed
    results = run(*jobs, ("c", ("run.seed=11",)))
    assert [result["status"] for result in results.values()] == ["complete"] * 3
    assert [len(calls(tmp_path / "out" / name)) for name in "abc"] == [1, 1, 1]
    assert "2 complete before" in capfd.readouterr().err


def test_a_failed_job_takes_no_other_with_it(run, tmp_path):
    jobs = [("bad", ("run.seed=1",)), ("killed", ("run.seed=3",)), ("good",)]
    with pytest.raises(JobsFailed) as caught:
        run(*jobs)
    text = str(caught.value)
    assert text.startswith(f"2 of 3 jobs failed: bad: this clip is no clip ({tmp_path}/out/bad.log); killed: killed by")
    assert "\n" not in text and list(caught.value.results) == ["good"]
    # Once the reason is gone, the same call goes on with those alone: `bad` has begun, so it is resumed.
    with pytest.raises(JobsFailed):
        run(*jobs)
    assert [len(calls(tmp_path / "out" / name)) for name in ("bad", "killed", "good")] == [2, 2, 1]


@pytest.mark.parametrize(
    ("seed", "toml", "ds", "words"),
    [
        (5, "", "8", "run.seed = 0, asked for is 5"),
        (0, "seconds = 5.0", "8", "data.seconds = 10.0, asked for is 5.0"),
        (0, "", "16", "train_batch_size = 8, asked for is 16"),
    ],
)
def test_a_job_that_was_done_otherwise_is_an_error_and_nothing_is_run(run, tmp_path, seed, toml, ds, words):
    run(("b", ("run.seed=0",)))
    run.files[0].write_text(f'[data]\nmanifest = "m"\n{toml}')
    run.files[1].write_text(f'{{"train_batch_size": {ds}}}')
    with pytest.raises(InputError) as caught:
        run(("c",), ("b", (f"run.seed={seed}",)))
    assert f"out/b: holds a run with {words}; choose" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out/c").exists()


def test_how_a_job_runs_may_change(run, tmp_path):
    run(("a", ("run.checkpoint_every=3",)))
    run.files[1].write_text('{"train_micro_batch_size_per_gpu": 8, "tensorboard": {"enabled": true}}')
    run(("a", ("run.checkpoint_every=5", "data.workers=2")))
    assert len(calls(tmp_path / "out/a")) == 1


def test_in_parallel_each_has_its_share_of_the_cores_and_no_rank(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    results = run(("a", ("run.seed=4",)), ("b", ("run.seed=4",)), parallel=2)
    assert [result["together"] for result in results.values()] == [2, 2]  # each waited for the other to begin
    for name in "ab":
        assert calls(tmp_path / "out" / name) == [
            {"OMP_NUM_THREADS": "3", "MASTER_PORT": None, "RANK": None, "workers": 3}
        ]


@pytest.mark.parametrize(("keep", "left"), [("all", 2), ("models", 1), ("result", 0)])
def test_what_is_kept(run, tmp_path, keep, left):
    with pytest.raises(JobsFailed):
        run(("a",), ("bad", ("run.seed=1",)), keep=keep)
    assert len(list((tmp_path / "out/a/checkpoints").iterdir())) == left
    assert len(list((tmp_path / "out/bad/checkpoints").iterdir())) == 2  # it is still to be resumed
    assert (tmp_path / "out/a/result.json").exists()


def test_complete_jobs_of_an_earlier_call_are_thinned_too(run, tmp_path):
    run(("a",))
    run(("a",), keep="models")
    assert [path.name for path in (tmp_path / "out/a/checkpoints").iterdir()] == ["iter1-distill"]


@pytest.mark.parametrize(
    ("jobs", "options", "words"),
    [
        ([("a",), ("a",)], {}, "two jobs have this name"),
        ([("../a",)], {}, "it names a folder"),
        ([("a", ("run.out=x",))], {}, "run.out is chosen here"),
        ([("a", ("run.sed=1",))], {}, "unknown key run.sed"),
        ([("a",)], {"parallel": 0}, "at least one"),
        ([("a",)], {"keep": "some"}, "all, models, result"),
    ],
)
def test_wrong_arguments_are_found_before_anything_runs(run, tmp_path, jobs, options, words):
    with pytest.raises(UsageError, match=words):
        run(*jobs, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_left_alone(run, tmp_path):
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/precious").touch()
    with pytest.raises(InputError, match="out/a: not a run of this version"):
        run(("a",))


JOBS = '[Job("a", ("run.seed=2",)), Job("b", ("run.seed=2",)), Job("c")]'
DRIVER = f"""
import sys
from fastsskd.errors import InputError
from fastsskd.many_runs import Job, run_many
jobs = {JOBS}
try:
    run_many(jobs, config=sys.argv[1], ds_config=sys.argv[2], out=sys.argv[3], launcher=sys.argv[4], parallel=2)
except InputError as error:
    sys.exit(f"error: {{error}}")
"""


def start_driver(run, tmp_path) -> subprocess.Popen:
    """A process with two jobs that wait for a signal, once they do."""
    files = [*map(str, run.files), str(tmp_path / "out"), str(FAKE)]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *files], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((tmp_path / "out" / name / "ready").exists() for name in "ab"):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.02)
    return driver


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_jobs_and_the_same_call_goes_on(run, tmp_path, number):
    driver = start_driver(run, tmp_path)
    children = psutil.Process(driver.pid).children()
    assert len(children) == 2
    driver.send_signal(number)
    _, printed = driver.communicate(timeout=30)
    assert driver.returncode == 1 and "error: stopped; 0 of 3 jobs are complete" in printed.splitlines()[-1]
    assert not any(child.is_running() for child in children)
    for name in "ab":
        assert (tmp_path / f"out/{name}.log").read_text() == "saved\n"
    assert not (tmp_path / "out/c").exists()
    assert list(run(("a", ("run.seed=2",)), ("b", ("run.seed=2",)), ("c",))) == ["a", "b", "c"]


def test_one_call_at_a_time_has_a_folder(run, tmp_path):
    driver = start_driver(run, tmp_path)
    try:
        with pytest.raises(InputError, match="another process is running jobs here"):
            run(("d",))
    finally:
        driver.terminate()
        driver.communicate(timeout=30)


@pytest.mark.slow
def test_real_runs_go_on_after_their_parent_was_killed(tones, tmp_path):
    """The trainings notice, save and stop; the next call resumes them, with the uninterrupted run's numbers."""
    toml, ds, out = tmp_path / "c.toml", tmp_path / "ds.json", tmp_path / "out"
    values = {**BASE, "data.manifest": json.dumps(str(tones)), "distill.epochs": 8}
    sections = {}
    for name, value in values.items():
        section, key = name.split(".")
        sections.setdefault(section, []).append(f"{key} = {value}")
    toml.write_text("\n".join(line for name, lines in sections.items() for line in [f"[{name}]", *lines]))
    ds.write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 1}}')
    files = {"config": toml, "ds_config": ds, "launcher": ROOT / "launch/train.py", "threads": 1}
    driver = DRIVER.replace(JOBS, '[Job("a")]')
    process = subprocess.Popen([sys.executable, "-c", driver, str(toml), str(ds), str(out), str(files["launcher"])])
    deadline = time.monotonic() + 240
    metrics = out / "a/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 6:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    child.wait(timeout=120)
    assert json.loads((out / "a/result.json").read_text())["status"] == "stopped"
    resumed = run_many([Job("a"), Job("again")], out=out, keep="models", **files)
    assert "continues from step" in (out / "a.log").read_text()
    assert resumed["a"]["metrics"]["mAP"] == pytest.approx(resumed["again"]["metrics"]["mAP"], abs=1e-6)
    a, again = ([json.loads(line)["loss"] for line in (out / name / "metrics.jsonl").open()] for name in resumed)
    assert a == pytest.approx(again, abs=1e-6)
    assert not list(out.glob("*/checkpoints/step-*")) and (out / "a/checkpoints/iter1-distill").is_dir()
