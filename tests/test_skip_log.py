"""The file that names the clips a run left out."""

import os
import subprocess
import sys

from fastsskd import skip_log


def test_each_clip_once_in_one_line(tmp_path):
    path = tmp_path / "skipped.tsv"
    skip_log.append(path, {"a.wav": "empty file"})
    skip_log.append(path, {"a.wav": "empty file", "b\tc.wav": "not audio\nbut text"})
    assert path.read_text() == "a.wav\tempty file\nb c.wav\tnot audio but text\n"
    skip_log.append(path, {"b\tc.wav": "another reason"})
    assert len(path.read_text().splitlines()) == 2


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path):
    skip_log.append(tmp_path / "no" / "folder.tsv", {"a": "b"})
    skip_log.append(tmp_path, {"a": "b"})
    assert os.listdir(tmp_path) == []


def test_processes_share_it(tmp_path):
    path = tmp_path / "skipped.tsv"
    code = (
        "import sys; from pathlib import Path; from fastsskd import skip_log\n"
        "for i in range(60): skip_log.append(Path(sys.argv[1]), {f'clip{i}': 'bad', f'{sys.argv[2]}-{i}': 'bad'})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    keys = [line.partition("\t")[0] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 180
