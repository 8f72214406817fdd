"""Noticing that the launcher has ended, and that nothing goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastsskd.alive import LAUNCHER_PID, Launcher, Watchdog

ROOT = Path(__file__).parents[1]
RANK = """
import os, sys, time
from fastsskd.alive import Launcher
launcher = Launcher()
print(os.getpid(), os.getppid(), launcher.gone(), flush=True)
deadline = time.monotonic() + 20
while not launcher.gone() and time.monotonic() < deadline:
    time.sleep(0.01)
print("gone" if launcher.gone() else "never noticed", flush=True)
"""
HELPER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.fixture
def launched(tmp_path):
    """A function that starts a process over a helper over the rank; returns the first one and the others' ids."""
    running = []

    def start(name, helper=("-m", "deepspeed.launcher.launch")):
        (tmp_path / "deepspeed/launcher").mkdir(parents=True)
        for package in ("deepspeed", "deepspeed/launcher"):
            (tmp_path / package / "__init__.py").touch()
        (tmp_path / "deepspeed/launcher/launch.py").write_text(HELPER)
        script = tmp_path / "bin" / name
        script.parent.mkdir()
        script.write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])")
        env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        command = [sys.executable, str(script), *helper, RANK]
        first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        rank, parent, gone = first.stdout.readline().split()
        running.append((first, int(rank), int(parent)))
        assert gone == "False"
        return first, int(rank), int(parent)

    yield start
    for first, *pids in running:
        for pid in [*pids, first.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        first.wait()
        first.stdout.close()


def test_the_deepspeed_command_is_missed_though_its_helper_lives(launched):
    first, _, _ = launched("deepspeed")
    first.terminate()
    assert first.stdout.readline() == "gone\n"


def test_the_helper_is_missed(launched):
    first, _, helper = launched("deepspeed")
    os.kill(helper, signal.SIGKILL)
    assert first.stdout.readline() == "gone\n"


def test_a_shell_or_a_script_may_end(launched):
    """``nohup bash run.sh &``: what is no launcher is not watched."""
    first, rank, _ = launched("some_script.py", helper=("-c",))
    first.kill()
    time.sleep(0.3)
    assert Path(f"/proc/{rank}").exists()


def test_without_a_launcher_nothing_is_ever_gone():
    assert not Launcher().gone()


@pytest.mark.parametrize(("pid", "gone"), [(os.getppid(), False), (2**22 + 1, True)])
def test_another_parent_may_say_that_it_is_the_launcher(monkeypatch, pid, gone):
    """One that has ended before this process looked is missed too."""
    monkeypatch.setenv(LAUNCHER_PID, str(pid))
    assert Launcher().gone() == gone


def test_no_beat_means_giving_up_once(monkeypatch):
    monkeypatch.setattr(Watchdog, "TICK", 0.01)
    given_up = threading.Event()
    with Watchdog(0.05, given_up.set):
        assert given_up.wait(5)


def test_beats_and_the_end_keep_it_quiet(monkeypatch):
    monkeypatch.setattr(Watchdog, "TICK", 0.01)
    calls = []
    watchdog = Watchdog(0.3, lambda: calls.append(1))
    for _ in range(2):  # one after the other, as stages are
        with watchdog:
            for _ in range(20):
                time.sleep(0.02)
                watchdog.beat()
    time.sleep(0.5)
    assert calls == []
