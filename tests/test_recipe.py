"""Whole runs, small: ranks, ZeRO stages, resume, bad input, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from fastsskd import layouts, manifest

ROOT = Path(__file__).parents[1]
BASE = {
    "data.seconds": 0.96,
    "model.size": '"nano"',
    "recipe.iterations": 1,
    "ssl.epochs": 2,
    "ssl.lr": 1e-3,
    "ssl.warmup_epochs": 0.5,
    "distill.epochs": 2,
    "distill.lr": 1e-3,
    "distill.warmup_epochs": 0.5,
    "run.log_every": 1,
}


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """Manifest of 40 clips of 0.96 s in 2 classes, low and high tones."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for number in range(40):
        time = np.arange(15360) / 16000
        pitch = random.uniform(200, 500) * (1, 6)[number % 2]
        wave = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.02 * random.standard_normal(len(time))
        path = folder / ("low", "high")[number % 2] / f"{number:02d}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wave, 16000)
    path = tmp_path_factory.mktemp("tables") / "tones.manifest"
    manifest.save(layouts.build(folder), path)
    return path


def command(out, tones, *, ds=None, resume=False, launcher=(), **fields):
    """The command line of a run; a double underscore in ``fields`` stands for the dot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    ds_file, toml = out.parent / f"{out.name}.ds.json", out.parent / f"{out.name}.toml"
    ds_file.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 1}, **(ds or {})}))
    values = {**BASE, **{name.replace("__", "."): value for name, value in fields.items()}}
    values |= {"run.out": json.dumps(str(out)), "data.manifest": json.dumps(str(tones))}
    sections = {}
    for name, value in values.items():
        section, key = name.split(".")
        sections.setdefault(section, []).append(f"{key} = {value}")
    toml.write_text("\n".join(line for name, lines in sections.items() for line in [f"[{name}]", *lines]))
    start = list(launcher) or [sys.executable]
    return [*start, str(ROOT / "launch/train.py"), "--ds_config", str(ds_file), "--config", str(toml)] + (
        ["--resume"] if resume else []
    )


def environment():
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**env, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


def run(out, tones, *, expect=0, **options):
    """Run to the end; returns metrics.jsonl, result.json and what was printed."""
    done = subprocess.run(
        command(out, tones, **options), env=environment(), capture_output=True, text=True, timeout=300, cwd=out.parent
    )
    printed = done.stdout + done.stderr
    assert done.returncode == expect, printed[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((out / "result.json").read_text()), printed


def deepspeed(ranks, port):
    return (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", str(port))


@pytest.fixture(scope="session")
def finished(tones, tmp_path_factory):
    """A run of one rank in float32 with a teacher, two iterations: folder, metrics, result, printed text."""
    out = tmp_path_factory.mktemp("runs") / "one"
    return out, *run(out, tones, recipe__iterations=2, distill__teacher='"supervised"', augment__mixup=0.5)


def losses(lines):
    return {(line["stage"], line["step"]): line["loss"] for line in lines}


def test_a_run_leaves_what_the_interface_promises(finished):
    out, lines, result, printed = finished
    for name in ("config.toml", "ds_config.json", "metrics.jsonl", "result.json", "plots/losses.png"):
        assert (out / name).stat().st_size > 0, name
    assert (out / "plots/iter1-ssl-views.png").exists()
    assert result["status"] == "complete" and result["seed"] == 0 and result["versions"]["torch"]
    assert [iteration["iteration"] for iteration in result["iterations"]] == [1, 2]
    assert result["num_train"] == 32 and result["num_eval"] == 8 and result["skipped"] == {}
    for iteration in result["iterations"]:
        assert iteration["metrics"]["num_clips"] == 8
        eight = {f"{term}_{view}" for term in ("restore", "mse", "kl", "contrast") for view in ("intra", "inter")}
        assert eight <= iteration["ssl"]["losses"].keys()
        assert {"label", "teacher_label", "regression"} <= iteration["distill"]["losses"].keys()
    stages = ["teacher", "iter1-ssl", "iter1-distill", "iter2-ssl", "iter2-distill"]
    assert list(dict.fromkeys(line["stage"] for line in lines)) == stages
    assert "ensemble" in printed and "clips/s" in printed and "left" in printed


def test_learning_rate_falls_by_a_fifth_after_each_iteration(finished):
    _, lines, _, _ = finished
    peak = {stage: max(line["lr"] for line in lines if line["stage"] == stage) for stage in ("iter1-ssl", "iter2-ssl")}
    assert peak["iter2-ssl"] / peak["iter1-ssl"] == pytest.approx(0.8)


def test_it_learns(finished):
    _, lines, result, _ = finished
    own = [line["loss"] for line in lines if line["stage"] == "iter1-ssl"]
    assert np.mean(own[-2:]) < np.mean(own[:2])
    assert result["metrics"]["accuracy"] >= 0.75  # two tones: chance is 0.5


def test_evaluate_command_gives_the_runs_own_metrics(finished, tones):
    out, _, result, _ = finished
    from fastsskd import cli
    from fastsskd.evaluate import evaluate
    from fastsskd.manifest import split

    _, held_out = split(manifest.load(tones))
    metrics = evaluate([out / "checkpoints/iter2-distill"], held_out)
    assert metrics["accuracy"] == result["metrics"]["accuracy"] and metrics["mAP"] == result["metrics"]["mAP"]
    both = [str(out / f"checkpoints/iter{k}-distill/model.safetensors") for k in (1, 2)]
    ensemble = evaluate(both, held_out)
    assert ensemble["mAP"] == result["ensemble"]["mAP"]
    assert cli.main(["evaluate", "--checkpoint", *both, str(tones)]) == 0


def test_two_ranks_give_the_losses_of_one(finished, tones, tmp_path):
    _, lines, result, _ = finished
    options = {"recipe__iterations": 2, "distill__teacher": '"supervised"', "augment__mixup": 0.5}
    two, result_two, _ = run(tmp_path / "two", tones, launcher=deepspeed(2, 29717), **options)
    one = losses(lines)
    assert losses(two).keys() == one.keys()
    for step, loss in losses(two).items():
        assert loss == pytest.approx(one[step], abs=2e-5), step
    for a, b in zip(lines, two, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert result_two["metrics"]["num_clips"] == result["metrics"]["num_clips"] == 8
    assert result_two["metrics"]["mAP"] == pytest.approx(result["metrics"]["mAP"], abs=1e-6)


@pytest.mark.parametrize(
    ("ds", "tolerance"),
    [
        ({"zero_optimization": {"stage": 0}}, 1e-6),
        ({"zero_optimization": {"stage": 2}}, 1e-6),
        ({"zero_optimization": {"stage": 3}}, 1e-5),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, 0.2),
        ({"gradient_accumulation_steps": 2}, None),
    ],
    ids=["zero0", "zero2", "zero3", "bf16", "accumulation"],
)
def test_zero_stages_precision_and_accumulation(tones, tmp_path, ds, tolerance, reference):
    """Without the contrast, whose negatives are those of a micro-batch, accumulation changes nothing either."""
    lines, _, _ = run(tmp_path / "run", tones, ds=ds, **REFERENCE)
    tolerance = 1e-5 if tolerance is None else tolerance
    for step, loss in losses(lines).items():
        assert loss == pytest.approx(reference[0][step], abs=tolerance), step
    state, expected = (
        load_file(f"{out}/checkpoints/iter1-distill/model.safetensors") for out in (tmp_path / "run", reference[1])
    )
    if tolerance < 0.01:
        worst = max((state[name] - expected[name]).abs().max().item() for name in expected)
        assert worst <= 2e-4
    if "bf16" in ds:  # the exported weights are the float32 master copy
        assert any((value.bfloat16().float() != value).any() for value in state.values())


REFERENCE = {"ssl__epochs": 1, "distill__epochs": 1, "loss__contrast_intra": "false", "loss__contrast_inter": "false"}


@pytest.fixture(scope="session")
def reference(tones, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    lines, _, _ = run(out, tones, **REFERENCE)
    return losses(lines), out


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_resume_after_sigterm_repeats_the_uninterrupted_run(tones, tmp_path, zero_stage):
    options = {"ds": {"zero_optimization": {"stage": zero_stage}}, "ssl__epochs": 10, "model__drop_path": 0.2}
    whole, result, _ = run(tmp_path / "whole", tones, **options)
    out = tmp_path / "cut"
    process = subprocess.Popen(
        command(out, tones, **options), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(process, out, 5)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1, printed[-2000:]
    assert json.loads((out / "result.json").read_text())["status"] == "stopped"
    stopped_at = len((out / "metrics.jsonl").read_text().splitlines())
    assert 5 <= stopped_at < len(whole)
    lines, result_cut, printed = run(out, tones, resume=True, **options)
    assert "continues from step" in printed
    assert losses(lines) == losses(whole)
    assert result_cut["metrics"]["mAP"] == result["metrics"]["mAP"]
    # A resume of a finished run trains nothing and says the same.
    again, result_again, _ = run(out, tones, resume=True, **options)
    assert losses(again) == losses(whole) and result_again["metrics"] == result["metrics"]


def test_resume_after_kill_continues_from_the_last_checkpoint(tones, tmp_path):
    """Also with weights that are averaged over epochs on both sides of the kill."""
    options = {"ssl__epochs": 1, "distill__epochs": 12, "distill__select": '"average"', "run__checkpoint_every": 4}
    whole, _, _ = run(tmp_path / "whole", tones, **options)
    out = tmp_path / "cut"
    process = subprocess.Popen(
        command(out, tones, **options), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_step(process, out, 40)  # 4 of SSL, then 36 of 48: the average began after 28
    process.kill()
    process.wait()
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    (newest / "mp_rank_00_model_states.pt").write_bytes(b"cut short")
    lines, _, printed = run(out, tones, resume=True, **options)
    assert "falling back to" in printed
    assert losses(lines) == losses(whole)
    files = [load_file(tmp_path / name / "checkpoints/iter1-distill/model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


def test_no_whole_checkpoint_is_an_error_not_a_restart(tones, tmp_path):
    out = tmp_path / "cut"
    options = {"ssl__epochs": 10, "run__checkpoint_every": 4}
    process = subprocess.Popen(
        command(out, tones, **options), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_step(process, out, 6)
    process.kill()
    process.wait()
    for path in (out / "checkpoints").glob("step-*/manifest.json"):
        path.unlink()
    done = subprocess.run(
        command(out, tones, resume=True, **options), env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1 and "is whole" in done.stderr and "Traceback" not in done.stderr


def wait_for_step(process, out, steps):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        file = out / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= steps:
            return
        time.sleep(0.02)
    pytest.fail(f"the run did not reach step {steps}: exit code {process.poll()}")


def test_a_corrupt_clip_is_named_at_the_end(tones, tmp_path):
    table = manifest.load(tones)
    folder = tmp_path / "clips"
    for i in range(len(table)):
        path = folder / table.path(i).parent.name / table.path(i).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(table.path(i).read_bytes()[: 900 if i == 3 else None])
    _, result, printed = run(tmp_path / "run", folder, **REFERENCE)
    assert result["status"] == "complete" and len(result["skipped"]) == 1
    (key,) = result["skipped"]
    assert Path(key).stem == table.path(3).stem and key in printed


def test_self_supervision_alone_needs_no_labels(tones, tmp_path):
    table = manifest.load(tones)
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(len(table)):
        (folder / f"{i:02d}.wav").write_bytes(table.path(i).read_bytes())
    _, result, _ = run(tmp_path / "run", folder, recipe__stages='["ssl"]', ssl__epochs=1)
    assert result["status"] == "complete" and result["metrics"] is None
    state = load_file(tmp_path / "run/checkpoints/iter1-ssl/model.safetensors")
    assert "blocks.0.attn.qkv.weight" in state and not any(name.startswith("head.") for name in state)
    # Its weights start a labelled run, whose head is fresh.
    init = json.dumps(str(tmp_path / "run/checkpoints/iter1-ssl"))
    stages = {"recipe__stages": '["distill"]', "distill__epochs": 1, "model__init": init}
    _, result, printed = run(tmp_path / "labelled", tones, **stages)
    assert result["metrics"]["num_clips"] == 8 and "4 missing" in printed
