"""The file that names the clips a run left out: ``key<TAB>reason``, each clip once, whoever found it."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Mapping
from pathlib import Path


def append(path: Path, skipped: Mapping[str, str]) -> None:
    """Add the clips that are not in the file yet; ranks and stages of a run share it.

    A file that cannot be written is no reason to stop training: the clips are in ``Loader.skipped`` too.
    """
    with contextlib.suppress(OSError), open(path, "a+", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # some network disks have no locks; then two ranks may name a clip twice
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = {line.partition("\t")[0] for line in file}
        rows = [(_one_field(key), _one_field(reason)) for key, reason in skipped.items()]
        file.write("".join(f"{key}\t{reason}\n" for key, reason in rows if key not in known))


def _one_field(text: str) -> str:
    return " ".join(text.split())
