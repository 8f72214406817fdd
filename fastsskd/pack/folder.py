"""The folder that `fastsskd pack` fills: one process at a time, one manifest and one set of options for ever.

shard-000000.tar ...   the clips
packed.manifest        what the loader opens; there only when everything is
rejected.tsv           key and reason of each clip that is not in the shards; empty if all are
pack.json              options, counts, versions
.pack/                 indexes of the shards, the lock, what is not finished
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastsskd import durable
from fastsskd.clip_table import PACKED_MANIFEST, SCHEMA, Manifest, one_chunk
from fastsskd.errors import InputError
from fastsskd.manifest import save
from fastsskd.pack.shards import WORK, write_whole

BREAKS = re.compile(r"[\t\r\n]")
REJECTED, ABOUT = "rejected.tsv", "pack.json"


@contextlib.contextmanager
def open_folder(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Make the folder or take it up again; nobody else may write to it meanwhile.

    Args:
        out: the folder.
        identity: what must be the same each time: the input's digest under "input", and options.

    Raises:
        InputError: it belongs to another manifest, other options, another program or a running process.
    """
    with _writable(out):
        (out / WORK).mkdir(parents=True, exist_ok=True)
        lock = open(out / WORK / "lock", "w")  # noqa: SIM115
    with lock:
        if not durable.lock(lock.fileno()):
            raise InputError(f"{out}: another `fastsskd pack` is writing there: wait for it")
        _refuse_other_use(out, identity)
        try:
            _remove_leftovers(out)
            if not (out / ABOUT).exists():
                with _writable(out):
                    write_about(out, identity, {"status": "running"})
            yield
        finally:
            _remove_leftovers(out)


def write_about(out: Path, identity: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write `pack.json`."""
    write_whole(out, out / ABOUT, json.dumps({"options": identity} | facts, indent=1) + "\n")


def write_rejected(out: Path, reasons: dict[str, str]) -> None:
    """Write `rejected.tsv`; tabs and line breaks in keys become blanks."""
    lines = (f"{BREAKS.sub(' ', key)}\t{reason}\n" for key, reason in reasons.items())
    write_whole(out, out / REJECTED, "".join(lines))


def write_result(out: Path, packed: Manifest) -> None:
    """Write the manifest, and with it that everything else is there."""
    temporary = out / WORK / f"{PACKED_MANIFEST}.tmp"
    save(packed, temporary, folder=out)
    durable.sync(temporary)
    os.replace(temporary, out / PACKED_MANIFEST)
    durable.sync(out)


def has_result(out: Path) -> bool:
    return (out / PACKED_MANIFEST).exists()


def remove_result(out: Path) -> None:
    """Before a shard is made, first or again: what describes all shards is not true any more."""
    (out / PACKED_MANIFEST).unlink(missing_ok=True)


def digest(manifest: Manifest, order: np.ndarray) -> str:
    """16 hex digits over all that the packed set is made from: every column, the classes, and the order of the clips.

    The root is not part of it: a data set that moved to another disk is still the same.
    """
    hasher = hashlib.blake2b(json.dumps([manifest.classes, manifest.multi_label]).encode(), digest_size=8)
    table = manifest.materialise()
    for name in SCHEMA.names:
        column = one_chunk(table.column(name))
        if isinstance(column, pa.ListArray):
            parts = np.diff(column.offsets), column.flatten()
        elif isinstance(column, pa.StringArray):
            parts = pc.binary_length(column), _letters(column)
        else:
            parts = (column,)
        for part in parts:
            hasher.update(np.ascontiguousarray(part))
    hasher.update(order.astype(np.int64))
    return hasher.hexdigest()


def _letters(strings: pa.StringArray) -> np.ndarray:
    """Bytes of all strings, one after the other."""
    _, offsets, letters = strings.buffers()
    offsets = np.frombuffer(offsets, np.int32)[strings.offset : strings.offset + len(strings) + 1]
    return np.frombuffer(letters or b"", np.uint8)[offsets[0] : offsets[-1]]


@contextlib.contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{out}: cannot write there ({error.strerror}): choose a folder you can write to") from None


def _remove_leftovers(out: Path) -> None:
    """Of a process that was killed, or of ours if it failed."""
    for leftover in (out / WORK).glob("*.tmp"):
        leftover.unlink()


def _refuse_other_use(out: Path, identity: dict[str, Any]) -> None:
    try:
        options = json.loads((out / ABOUT).read_text(encoding="utf-8"))["options"]
    except FileNotFoundError:
        if (out / PACKED_MANIFEST).exists() or any(out.glob("shard-*.tar")):
            raise InputError(f"{out}: holds shards but no {ABOUT}: choose another folder") from None
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out / ABOUT}: damaged: choose another folder, or remove this one") from None
    if options == identity:
        return
    name = next((name for name in identity if options.get(name) != identity[name]), "version")
    if name == "input":
        raise InputError(
            f"{out}: holds clips of another manifest, or of this one before it changed: choose another folder"
        )
    raise InputError(
        f"{out}: was begun with {name} = {options.get(name)}, now it is {identity.get(name)}: "
        "use the same options, or another folder"
    )
