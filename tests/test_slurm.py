"""launch/slurm.sh, under a Slurm of a few lines whose two nodes are this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training import arguments, environment, free_port

from fastsskd.evaluation import score_file

ROOT = Path(__file__).parents[1]

PROGRAMS = {
    # Both nodes at once, each with its number; the worst exit code, as the real one's.
    "srun": """
        while [[ "$1" == --* ]]; do echo "$1" >>"$LOG/srun"; shift; done
        for node in 0 1; do SLURM_NODEID=$node "$@" & all+=($!); done
        code=0; for one in "${all[@]}"; do wait "$one" || code=$?; done; exit "$code" """,
    "scontrol": """
        if [ "$1" = show ]; then printf '127.0.0.1\\nlocalhost\\n'; else echo "$@" >>"$LOG/scontrol"; fi """,
    "squeue": """echo "${STATE:-RUNNING}" """,
}


class Job:
    """A job's environment: programs, and an environment for Python."""

    def __init__(self, folder: Path, torchrun: str | None = None):
        self.log = folder / "log"
        self.log.mkdir()
        programs, venv = folder / "programs", folder / "venv/bin"
        for name, text in PROGRAMS.items():
            self._program(programs / name, text)
        venv.mkdir(parents=True)
        for name in ("python", "torchrun"):
            (venv / name).symlink_to(Path(sys.executable).parent / name)
        if torchrun is not None:
            (venv / "torchrun").unlink()
            self._program(venv / "torchrun", torchrun)
        slurm = {"JOB_ID": free_port() - 20000, "JOB_NODELIST": "node-[1-2]", "NNODES": 2, "CPUS_PER_TASK": 40}
        self.env = environment() | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        self.env |= {"SLURM_SUBMIT_DIR": str(ROOT), "FASTSSKD_VENV": str(venv.parent), "LOG": str(self.log)}
        self.env["PATH"] = f"{programs}:{os.environ['PATH']}"

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text.strip()}\n")
        path.chmod(0o755)

    def run(self, given: list[str], **env) -> subprocess.CompletedProcess:
        script = shutil.copy(ROOT / "launch/slurm.sh", self.log.parent / "slurm_script")  # as Slurm does
        return subprocess.run(
            ["bash", script, *given], env=self.env | env, capture_output=True, text=True, timeout=300, cwd="/"
        )

    def said(self, name: str) -> str:
        file = self.log / name
        return file.read_text() if file.exists() else ""


STAND_IN = """
[ $SLURM_NODEID = 0 ] || exit 1
printf '%s\\n' "$@" >>"$LOG/torchrun"
mkdir -p "$OUT"; touch "$OUT/config.toml"
[ -z "$STATUS" ] || printf '{\\n "status": "%s",\\n "seconds": %s\\n}\\n' "$STATUS" "$RANDOM.$$" >"$OUT/result.json" """


@pytest.fixture
def job(tmp_path):
    """One whose training is a stand-in that leaves the status that it is told."""
    return Job(tmp_path, STAND_IN)


def given(out: Path) -> list[str]:
    config = ["--ds_config", "launch/ds_config.json", "--config", "launch/configs/quickstart.toml"]
    return [*config, "--set", f"run.out={out}", "--set", "recipe.stages=['ssl']"]


def test_arguments_reach_every_node_and_the_second_try_resumes(job, tmp_path):
    out = tmp_path / "the run"
    done = job.run(given(out), STATUS="complete", OUT=str(out), SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 0 and "complete" in done.stdout, done.stderr  # although a launcher failed
    words = job.said("torchrun").splitlines()
    first = {"--nnodes": "2", "--node_rank": "0", "--nproc_per_node": "8", "--master_addr": "127.0.0.1"}
    assert {word: words[words.index(word) + 1] for word in first} == first
    assert words[words.index("launch/train.py") + 1 :] == given(out)
    assert "--cpus-per-task=40" in job.said("srun") and not job.said("scontrol")
    assert job.run(given(out), STATUS="complete", OUT=str(out)).returncode == 0
    assert job.said("torchrun").splitlines()[-1] == "--resume"


@pytest.mark.parametrize(
    ("status", "state", "again"),
    [("stopped", "RUNNING", True), ("stopped", "CANCELLED", False), ("failed", "RUNNING", False)],
)
def test_a_job_goes_back_into_the_queue_when_its_time_is_over_and_only_then(job, tmp_path, status, state, again):
    done = job.run(given(tmp_path / "run"), STATUS=status, OUT=str(tmp_path / "run"), STATE=state)
    assert done.returncode == 1 and f": {status} (" in done.stdout
    assert job.said("scontrol").startswith("requeue ") == again


def test_the_result_of_an_earlier_try_is_not_taken_for_this_one_s(job, tmp_path):
    out = tmp_path / "run"
    for status in ("stopped", ""):
        done = job.run(given(out), STATUS=status, OUT=str(out))
    assert done.returncode == 1 and ": none (" in done.stdout
    assert len(job.said("scontrol").splitlines()) == 1


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"SLURM_SUBMIT_DIR": "/"}, "no launch/train.py here; submit from the checkout"),
        ({"SLURM_JOB_NODELIST": ""}, "not in a Slurm job; use sbatch"),
        ({"FASTSSKD_VENV": "/nowhere"}, "no environment in /nowhere"),
    ],
)
def test_what_is_missing_is_said_in_a_line(job, tmp_path, env, words):
    done = job.run(given(tmp_path / "run"), **env)
    assert done.returncode == 1 and words in done.stderr and not job.said("srun")


def test_wrong_arguments_are_found_before_any_node_starts(job, tmp_path):
    done = job.run([*given(tmp_path / "run"), "--set", "model.size=giant"])
    assert done.returncode == 2 and "model.size" in done.stderr and not job.said("srun")


@pytest.mark.slow
def test_two_nodes_train_together(tones, tmp_path):
    job, out = Job(tmp_path), tmp_path / "run"
    options = {"recipe__stages": '["distill"]', "distill__epochs": 1, "data__eval_share": 0.5}
    done = job.run(arguments(out, tones, ds={"train_batch_size": 20}, **options), SLURM_GPUS_ON_NODE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "complete" and result["iterations"][0]["distill"]["clips_per_second"] > 0
    (line,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert line["clips"] == 20  # one step, of both ranks' clips
    assert json.loads((out / "ds_config.json").read_text())["train_micro_batch_size_per_gpu"] == 10
    assert len(score_file.load(out / "scores/iter1-distill.npz").key) == 20
