"""What goes wrong in a long training, done to real processes; after each fault --resume repeats the whole run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training import ROOT, arguments, environment, free_port, losses, metrics

STEPS = 16
OPTIONS = {"recipe__stages": '["ssl"]', "ssl__epochs": 4, "run__checkpoint_every": 4}
LONG = {**OPTIONS, "ssl__epochs": 100, "optim__schedule": '"constant"'}  # its steps are those of a shorter run
STEP, SAVE, LOSS = "fastsskd.engine._optimize", "fastsskd.engine_state.save_file", "fastsskd.pretrain.Pretrain.forward"


def harm(do, function, *calls, rank=1):
    return [{"do": do, "function": function, "calls": list(calls), "rank": rank}]


@pytest.fixture(scope="module")
def whole(training, tones, tmp_path_factory):
    """Losses of the run that nothing happens to, by its number of ranks."""
    folder = tmp_path_factory.mktemp("whole")
    return {n: losses(training.run(folder / str(n), tones, ranks=n, **OPTIONS)[0]) for n in (1, 2)}


@pytest.fixture(scope="module")
def killed(training, tones, tmp_path_factory):
    """Folder of a run of 1 or 2 ranks, the last of which was killed in step 10; checkpoints of steps 4 and 8."""
    folders = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp("killed") / "run"
        run = training.start(out, tones, ranks=ranks, harm=harm("kill", STEP, 10, rank=ranks - 1), **OPTIONS)
        assert run.wait()[-1] == -signal.SIGKILL
        folders[ranks] = out
    return folders


@pytest.fixture(autouse=True)
def no_orphans(training):
    yield
    assert training.left_over() == []


@pytest.fixture
def resume(training, tones, tmp_path):
    """A function that resumes the run in a folder, or in a copy of it; returns its losses and what it printed."""

    def go_on(out, *, copy=False, ranks=2, **options):
        if copy:
            out = shutil.copytree(out, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        lines, result, printed = training.run(out, tones, ranks=ranks, resume=True, **{**OPTIONS, **options})
        assert result["status"] == "complete"
        return losses(lines), printed

    return go_on


def checkpoints(out):
    return sorted(path.name for path in (out / "checkpoints").glob("*step*"))


def step_of(name):
    return f"step-{name:08d}"


def errors(printed):
    assert "Traceback" not in printed
    return [line for line in printed.splitlines() if line.startswith("error")]


# ----------------------------------------------------------------------------------------------------- killed, frozen


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_a_step(training, tones, tmp_path, whole, resume, rank):
    out = tmp_path / "run"
    run = training.start(out, tones, ranks=2, harm=harm("kill", STEP, 10, rank=rank), **OPTIONS)
    codes = run.wait(60)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    (line,) = errors(run.printed)
    assert f"rank {1 - rank} lost contact with another rank" in line and "--resume" in line
    assert checkpoints(out) == [step_of(4), step_of(8)]
    if rank == 0:
        assert not (out / "result.json").exists()
    else:
        assert run.result["status"] == "failed" and "lost contact" in run.result["reason"]
    assert resume(out)[0] == whole[2]


@pytest.mark.parametrize(
    ("rank", "function", "do", "newest"),
    [
        (0, SAVE, "write half and die", 8),
        (1, SAVE, "write half and die", 8),
        (1, "fastsskd.checkpoint._hash", "kill", 8),
        (0, "fastsskd.checkpoint._write_manifest", "kill", 8),
        (0, "fastsskd.checkpoint._remove_others", "kill", 12),
    ],
    ids=["writing-0", "writing-1", "hashing-1", "manifest-0", "renamed-0"],
)
def test_a_rank_killed_while_it_saves(training, tones, tmp_path, whole, resume, rank, function, do, newest):
    out = tmp_path / "run"
    run = training.start(out, tones, ranks=2, harm=harm(do, function, 3, rank=rank), **OPTIONS)
    codes = run.wait(60)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    lines, printed = resume(out)
    assert f"continues from step {newest} " in printed and "falling back" not in printed
    assert lines == whole[2]
    assert checkpoints(out)[-2:] == [step_of(8), step_of(12)]
    assert not list((out / "checkpoints").glob("tmp-*"))


def test_a_frozen_rank(training, tones, tmp_path, whole, resume):
    out = tmp_path / "run"
    run = training.start(out, tones, ranks=2, harm=harm("freeze", STEP, 10), run__timeout=10, **OPTIONS)
    run.wait_for_step(9)
    begin = time.monotonic()
    while run.codes()[0] is None:
        assert time.monotonic() - begin < 30
        time.sleep(0.05)
    assert run.codes() == [1, None]
    (line,) = errors(run.printed)
    assert ("no step for 10 s (run.timeout)" in line or "lost contact" in line) and "stands still" in line
    assert run.result["status"] == "failed"
    os.kill(run.pids[1], signal.SIGCONT)  # alone, it ends by itself
    assert run.wait(30) == [1, 1]
    assert resume(out)[0] == whole[2]


# ------------------------------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize(
    "asked", [harm("terminate", STEP, 6), harm("interrupt", STEP, 6, rank=0) + harm("interrupt", STEP, 7)]
)
def test_a_signal_stops_all_ranks_after_the_same_step(training, tones, tmp_path, whole, resume, asked):
    """SIGTERM to one rank; Ctrl-C, which reaches them one by one."""
    out = tmp_path / "run"
    run = training.start(out, tones, ranks=2, harm=asked, **OPTIONS)
    assert run.wait(60) == [1, 1]
    assert run.result["status"] == "stopped" and errors(run.printed) == []
    assert len(metrics(out)) == 7 and checkpoints(out) == [step_of(4), step_of(7)]
    assert "stopped after step 7" in run.result["reason"]
    assert resume(out)[0] == whole[2]


def test_a_stop_while_evaluating_loses_nothing(training, tones, tmp_path):
    options = {"recipe__stages": '["distill"]'}
    out = tmp_path / "run"
    expected, result, _ = training.run(tmp_path / "whole", tones, **options)
    # The signal comes while the model is read that is to be evaluated.
    run = training.start(out, tones, harm=harm("terminate", "fastsskd.weights.load_model", 1, rank=0), **options)
    assert run.wait(60) == [1] and run.result["status"] == "stopped"
    assert "stopped while evaluating" in run.result["reason"] and checkpoints(out) == []
    lines, resumed, printed = training.run(out, tones, resume=True, **options)
    assert losses(lines) == losses(expected) and resumed["metrics"] == result["metrics"]
    assert "distill  step" not in printed  # not trained again


class Command:
    """A real ``deepspeed`` command and the processes below it."""

    def __init__(self, out, tones, log, *launcher):
        script = str(Path(sys.executable).with_name("deepspeed"))
        train = [str(ROOT / "launch/train.py"), *arguments(out, tones, **LONG)]
        self.log = log
        with open(log, "w") as file:
            options = {"env": environment(), "stdout": file, "stderr": file, "start_new_session": True}
            self.first = psutil.Popen([script, "-q", *launcher, *train], **options)

    def everybody(self):
        """The command, its helper and the ranks."""
        return [self.first, *self.first.children(recursive=True)]

    def printed(self):
        return Path(self.log).read_text()


def wait_for_step(out, steps, commands):
    end = time.monotonic() + 120
    while len(metrics(out)) < steps:
        assert time.monotonic() < end and all(c.first.poll() is None for c in commands), commands[0].printed()[-3000:]
        time.sleep(0.05)


def end_of(processes, seconds):
    """Wait until all have ended; end what is left, which is a failure."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    assert alive == []


def assert_stopped(out, printed):
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "stopped", printed[-3000:]
    step = len(metrics(out))
    assert step >= 5 and checkpoints(out)[-1] == step_of(step) and "error" not in printed
    return step


@pytest.mark.slow
def test_ctrl_c_to_the_deepspeed_command(tones, tmp_path):
    out = tmp_path / "run"
    command = Command(out, tones, tmp_path / "log", "--num_gpus", "2", "--master_port", str(free_port()))
    wait_for_step(out, 5, [command])
    everybody = command.everybody()
    assert len(everybody) == 4
    for process in everybody:
        assert "/dev/shm" not in Path(f"/proc/{process.pid}/maps").read_text()  # so nothing there can be left over
    os.killpg(command.first.pid, signal.SIGINT)
    end_of(everybody, 60)
    assert_stopped(out, command.printed())


@pytest.mark.slow
def test_two_nodes_and_sigterm_to_the_command_on_one(training, tones, tmp_path):
    """The signal kills the command alone; its ranks notice, and both nodes save the same step."""
    out, hosts, port = tmp_path / "run", tmp_path / "hostfile", str(free_port())
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    shared = ["--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port, "--node_rank"]
    commands = [Command(out, tones, tmp_path / f"log{node}", *shared, str(node)) for node in (0, 1)]
    wait_for_step(out, 5, commands)
    everybody = [process for command in commands for process in command.everybody()]
    assert len(everybody) == 6
    commands[1].first.terminate()
    end_of(everybody, 60)
    step = assert_stopped(out, commands[0].printed() + commands[1].printed())
    resumed = training.start(out, tones, ranks=2, resume=True, **LONG)
    resumed.wait_for_step(step + 2)
    os.kill(resumed.pids[0], signal.SIGTERM)
    assert resumed.wait() == [1, 1] and f"continues from step {step} " in resumed.printed
    own = losses(metrics(out))
    shorter = {**LONG, "ssl__epochs": len(own) // 4 + 1, "run__checkpoint_every": 0}
    expected = losses(training.run(tmp_path / "whole", tones, ranks=2, **shorter)[0])
    assert {key: expected[key] for key in own} == own


# ------------------------------------------------------------------------------------------------------------ the disk


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "bit-flipped", "missing"])
def test_a_damaged_checkpoint(killed, tmp_path, whole, resume, damage):
    out = shutil.copytree(killed[2], tmp_path / "run")
    damage(out / "checkpoints" / step_of(8) / "engine-00002-of-00002.safetensors")
    lines, printed = resume(out)
    assert "falling back to" in printed and "engine-00002-of-00002" in printed and "continues from step 4 " in printed
    assert lines == whole[2]


def test_no_whole_checkpoint_is_an_error_not_a_restart(training, tones, killed, tmp_path):
    out = shutil.copytree(killed[2], tmp_path / "run")
    for path in (out / "checkpoints").glob("step-*/manifest.json"):
        path.unlink()
    run = training.start(out, tones, ranks=2, resume=True, **OPTIONS)
    assert run.wait() == [1, 1]
    (line,) = errors(run.printed)
    assert "no checkpoint in" in line and "is whole" in line
    assert checkpoints(out) == [step_of(4), step_of(8)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_while_saving(training, tones, tmp_path, whole, resume, rank):
    out = tmp_path / "run"
    run = training.start(out, tones, ranks=2, harm=harm("fill the disk", SAVE, 2, rank=rank), **OPTIONS)
    assert run.wait(60) == [1, 1]
    (line,) = errors(run.printed)
    assert f"{step_of(8)} could not be written (rank {rank}: " in line and "make room, then --resume" in line
    assert checkpoints(out) == [step_of(4)]
    assert resume(out)[0] == whole[2]


def test_two_runs_with_one_port(tones, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(ROOT / "launch/train.py"), *arguments(tmp_path / "run", tones, **OPTIONS)]
        run = subprocess.run(command, env=environment() | rank, capture_output=True, text=True, timeout=120)
    (line,) = errors(run.stderr)
    assert run.returncode == 1 and f"port {port} of this machine is taken" in line and "Traceback" not in run.stderr


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("ds", [{}, {"zero_optimization": {"stage": 0}}], ids=["zero1", "zero0"])
def test_a_nan_on_one_rank(training, tones, tmp_path, ds):
    """Skipped, named, and training goes on with the losses of a run that leaves out just that update."""
    runs = {}
    for rank in (0, 1):
        out = tmp_path / str(rank)
        lines, result, printed = training.run(
            out, tones, ranks=2, harm=harm("nan", LOSS, 3, rank=rank), ds=ds, **{**OPTIONS, "ssl__epochs": 2}
        )
        assert result["status"] == "complete"
        (bad,) = [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]
        assert (bad["step"], bad["rank"], bad["loss"], len(bad["keys"])) == (3, rank, "nan", 4)
        assert printed.count("skipped") == 1 and f"skipped step 3: the loss of rank {rank} is nan" in printed
        assert bad["keys"][0] in printed
        runs[rank] = losses(lines), set(bad["keys"])
    assert not runs[0][1] & runs[1][1]
    after = [{key: loss for key, loss in run.items() if key[1] > 3} for run, _ in runs.values()]
    assert after[0] == after[1] and len(after[0]) == 5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["ssl", "distill"])
def test_a_gradient_that_is_nan_is_blamed_on_its_clip(training, tones, tmp_path, stage, kind):
    """Every loss is finite, and the gradients of the weights are NaN on both ranks alike."""
    out, passes = tmp_path / "run", {"ssl": 2, "distill": 1}[kind]  # of the AFT in a step; the raw view's comes first
    spoiled = harm("nan gradient", "fastsskd.model.ACM.aft", 3 * passes)
    options = {**OPTIONS, "recipe__stages": f'["{kind}"]', f"{kind}__epochs": 2, "run__checkpoint_every": 0}
    lines, result, printed = training.run(
        out, tones, ranks=2, harm=spoiled, ds={"zero_optimization": {"stage": stage}}, **options
    )
    assert result["status"] == "complete"
    (bad,) = [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]
    assert (bad["step"], bad["rank"], len(bad["keys"])) == (3, 1, 1) and float(bad["loss"]) > 0
    assert "the gradient of 1 clip(s) of rank 1 is not finite, though every rank's loss is" in printed
    assert f"bad_steps.jsonl: {bad['keys'][0]}\n" in printed
    assert all(line["loss"] > 0 for line in lines)


def test_too_many_nans_in_a_row(training, tones, tmp_path, whole, resume):
    out = tmp_path / "run"
    run = training.start(out, tones, ranks=2, harm=harm("nan", LOSS, *range(10, 17)), optim__max_bad_steps=4, **OPTIONS)
    assert run.wait(60) == [1, 1]
    (line,) = errors(run.printed)
    assert "gave up at step 13: the loss of rank 1 is nan (in a row: 4" in line
    assert run.result["status"] == "failed"
    assert checkpoints(out) == [step_of(4), step_of(8)]  # and none of step 12, which was skipped
    assert resume(out)[0] == whole[2]


def test_the_smallest_loss_scale(training, tmp_path):
    training.call("engines.overflow_at_the_smallest_loss_scale", ranks=2)


# ------------------------------------------------------------------------------------------ resumed as something else


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize(
    ("ranks", "ds", "tolerance"),
    [
        (1, {}, 1e-6),
        (1, {"zero_optimization": {"stage": 0}}, 1e-6),
        (1, {"zero_optimization": {"stage": 2}}, 1e-6),
        (1, {"zero_optimization": {"stage": 3}}, 1e-6),
        (2, {}, 1e-6),
        (2, {"zero_optimization": {"stage": 0}}, 1e-6),
        (2, {"zero_optimization": {"stage": 2}}, 1e-6),
        (2, {"zero_optimization": {"stage": 3}}, 1e-6),
        (2, {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, 0.2),
    ],
    ids=lambda value: str(value).replace("zero_optimization", "") if isinstance(value, dict) else None,
)
def test_other_ranks_stages_and_precisions(killed, resume, whole, before, ranks, ds, tolerance):
    lines, printed = resume(killed[before], copy=True, ranks=ranks, ds=ds)
    assert f"continues from step 8 (step-00000008, written by {before} rank(s), ZeRO 1, fp32)" in printed
    assert lines.keys() == whole[before].keys()
    for key, loss in whole[before].items():
        assert lines[key] == pytest.approx(loss, abs=tolerance), key
    if ranks == before and not ds:
        assert lines == whole[before]


def test_accumulation_instead_of_ranks(training, tones, tmp_path):
    """Without the contrast, whose negatives are those of a micro-batch."""
    options = {**OPTIONS, "loss__contrast_intra": "false", "loss__contrast_inter": "false"}
    expected = losses(training.run(tmp_path / "whole", tones, **options)[0])
    out = tmp_path / "run"
    training.start(out, tones, harm=harm("kill", STEP, 10, rank=0), **options).wait()
    lines, _, _ = training.run(out, tones, resume=True, ds={"gradient_accumulation_steps": 4}, **options)
    for key, loss in losses(lines).items():
        assert loss == pytest.approx(expected[key], abs=1e-6), key


def test_another_total_batch_is_refused(training, tones, killed, tmp_path):
    out = shutil.copytree(killed[2], tmp_path / "run")
    run = training.start(out, tones, ranks=2, resume=True, ds={"train_batch_size": 4}, **OPTIONS)
    assert run.wait() == [1, 1]
    (line,) = errors(run.printed)
    assert "written with train_batch_size 8, this run has 4; resume with the same total" in line


def test_averaged_weights_and_stochastic_depth(training, tones, tmp_path):
    """The average of the last epochs' weights has summands from both sides of the kill."""
    options = {
        "recipe__stages": '["distill"]',
        "distill__epochs": 12,
        "distill__select": '"average"',
        "model__drop_path": 0.2,
        "run__checkpoint_every": 4,
    }
    whole, _, _ = training.run(tmp_path / "whole", tones, **options)
    out = tmp_path / "cut"
    training.start(out, tones, harm=harm("kill", STEP, 38, rank=0), **options).wait()  # the average begins after 28
    lines, _, printed = training.run(out, tones, resume=True, **options)
    assert "continues from step 36 " in printed
    assert losses(lines) == losses(whole)
    files = [load_file(tmp_path / name / "checkpoints/iter1-distill/model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    # A resume of a finished run trains nothing and says the same.
    again, result, _ = training.run(out, tones, resume=True, **options)
    assert losses(again) == losses(whole) and result["status"] == "complete"
