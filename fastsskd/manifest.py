"""Manifests on disk: load, save, mark clips bad, split into training and evaluation.

The file is one Arrow IPC file, uncompressed and in one record batch, so that loading is a memory map: 2 M clips open in
milliseconds and every rank of a node shares the same pages. A CSV with a `path` column, written by hand, loads too.

    path,label,fold,split
    dogs/a.wav,dog,1,train
    street/b.flac,dog;car,2,eval

Only `path` is required; it is relative to the CSV. Several labels are separated by `;`. `split` is empty, `train` or
`eval` (or `test`); `fold` counts from 1. `key`, `start` and `end` (seconds) and `weight` (how often training draws the
clip, with data.sampling = "weights") are read as well.
"""

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from fastsskd.clip_columns import from_columns, split_names, strings
from fastsskd.clip_table import (
    PACKED,
    SCHEMA,
    SPLIT_EVAL,
    SPLIT_NONE,
    SPLIT_TRAIN,
    WHOLE_FILE,
    Manifest,
    one_chunk,
)
from fastsskd.errors import InputError
from fastsskd.layouts.files_present import keep_present
from fastsskd.split import split

__all__ = ["Manifest", "keep_existing", "load", "mark_bad", "save", "split"]

ARROW_MAGIC = b"ARROW1"
METADATA_KEY = b"fastsskd.manifest"
VERSION = 2
SPLIT_CODES = {"": SPLIT_NONE, "train": SPLIT_TRAIN, "eval": SPLIT_EVAL, "test": SPLIT_EVAL}
CSV_COLUMNS = ("path", "key", "label", "labels", "fold", "split", "start", "end", "weight")


def load(path: str | Path) -> Manifest:
    """Open a manifest written by `save` (memory-mapped) or a CSV with at least a `path` column.

    Raises:
        InputError: no such file, a folder, something else than a manifest, a damaged one, or no clip in it.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a manifest: run `fastsskd index {path} --out MANIFEST` first")
    try:
        head = _head(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such manifest: make it with `fastsskd index SRC --out {path}`") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check its permissions") from None
    if head == ARROW_MAGIC:
        manifest = _load_arrow(path)
    elif path.suffix.lower() == ".csv":
        manifest = _load_csv(path)
    else:
        raise InputError(
            f"{path}: neither a manifest nor a .csv with a `path` column: run `fastsskd index SRC --out MANIFEST`"
        )
    if not len(manifest):
        raise InputError(f"{path}: lists no clip: index a folder that holds audio")
    return manifest


def save(manifest: Manifest, path: str | Path, folder: Path | None = None) -> None:
    """Write the manifest's selected rows; the file appears whole or not at all.

    A packed manifest in the folder of its shards says so instead of naming the folder, which may then be moved.

    Args:
        folder: where the file will lie in the end, if not here.

    Raises:
        InputError: the folder is missing or cannot be written.
    """
    path = Path(path)
    moves_along = manifest.source == PACKED and (folder or path.parent).absolute() == manifest.root.absolute()
    about = {
        "version": VERSION,
        "classes": manifest.classes,
        "multi_label": manifest.multi_label,
        "root": "." if moves_along else str(manifest.root.absolute()),
        "source": manifest.source,
        "num_absent": manifest.num_absent,
        "absent": manifest.absent,
    }
    table = manifest.materialise().replace_schema_metadata({METADATA_KEY: json.dumps(about)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise InputError(f"{path}: cannot write the manifest ({reason}): choose a folder you can write to") from None
    finally:
        temporary.unlink(missing_ok=True)


def mark_bad(path: str | Path, reasons: Mapping[str, str]) -> None:
    """Write into the manifest at `path` why clips must not be used; atomic. A reason of "" makes a clip good again.

    Raises:
        InputError: not a manifest written by `save`, or a key that is not in it.
    """
    path = Path(path)
    manifest = load(path)
    if _head(path) != ARROW_MAGIC:
        raise InputError(f"{path}: a CSV has no place for bad clips: run `fastsskd index {path} --out MANIFEST` first")
    where = pc.index_in(pa.array(list(reasons), pa.string()), value_set=manifest.table.column("key").combine_chunks())
    if where.null_count:
        unknown = next(key for key, row in zip(reasons, where.to_pylist(), strict=True) if row is None)
        raise InputError(f"{path}: has no clip {unknown!r} to mark: give keys as the manifest has them")
    save(manifest.mark(dict(zip(where.to_pylist(), reasons.values(), strict=True))), path)


def keep_existing(manifest: Manifest) -> Manifest:
    """The clips whose files are there now; the others are counted and named in the result's `absent`.

    One listing per folder, so 2 M clips take seconds. `load` does not do this for a saved manifest.

    Raises:
        InputError: not one file is there.
    """
    paths = manifest.materialise()["path"]
    there, absent = keep_present(one_chunk(paths), manifest.root, listed_in=manifest.root)
    if there.all():
        return manifest
    kept = manifest.replace(absent=manifest.absent + absent, num_absent=manifest.num_absent + len(absent))
    return kept.select(there)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(ARROW_MAGIC))


def _load_arrow(path: Path) -> Manifest:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        about = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"null"))
        table.validate()
    except (pa.ArrowException, OSError, ValueError):
        raise InputError(f"{path}: the manifest is damaged or cut short: run `fastsskd index` again") from None
    if about is not None and about["version"] != VERSION:
        raise InputError(f"{path}: manifest of version {about['version']}, not {VERSION}: run `fastsskd index` again")
    if about is None or not table.schema.equals(SCHEMA):
        raise InputError(f"{path}: an Arrow file, but not one of ours: make it with `fastsskd index SRC --out {path}`")
    about.pop("version")
    if about["root"] == ".":
        about["root"] = path.absolute().parent
    return Manifest(table.replace_schema_metadata(None), **about)


def _load_csv(path: Path) -> Manifest:
    columns = _read_csv(path)
    lists, classes = _parse_labels(columns.get("labels", columns.get("label")))
    root = path.absolute().parent
    present, absent = keep_present(columns["path"], root, listed_in=path)
    multi_label = lists is not None and pc.max(pc.list_value_length(lists)).as_py() > 1
    manifest = from_columns(
        columns["path"],
        root=root,
        keys=columns.get("key"),
        labels=lists,
        classes=classes,
        multi_label=multi_label,
        folds=_numbers(path, columns, "fold", pa.int16(), 0),
        splits=_split_codes(path, columns.get("split")),
        starts=_numbers(path, columns, "start", pa.float32(), WHOLE_FILE[0]),
        ends=_numbers(path, columns, "end", pa.float32(), WHOLE_FILE[1]),
        weights=_numbers(path, columns, "weight", pa.float32(), 1.0),
        source="csv",
        absent=absent,
    )
    return manifest if not absent else manifest.select(present)


def _read_csv(path: Path) -> dict[str, pa.Array]:
    """Known columns of the CSV as string arrays, blanks around values removed."""
    options = csv.ConvertOptions(column_types=dict.fromkeys(CSV_COLUMNS, pa.string()), strings_can_be_null=False)
    try:
        table = csv.read_csv(path, convert_options=options)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a CSV we can read ({str(error).splitlines()[0]}): correct that line") from None
    for name in table.column_names:
        like = difflib.get_close_matches(name.strip().lower(), CSV_COLUMNS, n=1)
        # A misspelt `label` would otherwise make the set silently unlabelled.
        if name not in CSV_COLUMNS and like and like[0] not in table.column_names:
            raise InputError(f"{path}: column {name!r} is unknown: did you mean {like[0]!r}?")
    if "path" not in table.column_names:
        raise InputError(f"{path}: has no `path` column: its first line must name the columns, `path` among them")
    present = [name for name in CSV_COLUMNS if name in table.column_names]
    columns = {name: strings(pc.utf8_trim_whitespace(table[name])) for name in present}
    if pc.any(pc.equal(columns["path"], "")).as_py():
        row = pc.index(columns["path"], "").as_py()
        raise InputError(f"{path}: row {row + 2} has an empty path: write the file's name or remove the row")
    return columns


def _parse_labels(text: pa.Array | None) -> tuple[pa.ListArray | None, tuple[str, ...]]:
    """`dog;car` -> list of label ids a row, and the names in id order (numeric names by value)."""
    if text is None or pc.all(pc.equal(text, "")).as_py():
        return None, ()
    names, offsets = split_names(text, ";")
    unique = pc.unique(names).to_pylist()
    classes = sorted(unique, key=int) if all(name.isdecimal() for name in unique) else sorted(unique)
    ids = pc.index_in(names, value_set=pa.array(classes)).cast(pa.int16())
    return pa.ListArray.from_arrays(offsets, ids), tuple(classes)


def _numbers(path: Path, columns: Mapping, name: str, kind: pa.DataType, default: float) -> np.ndarray | None:
    if name not in columns:
        return None
    text = pc.if_else(pc.equal(columns[name], ""), str(kind.to_pandas_dtype()(default)), columns[name])
    try:
        return text.cast(kind).to_numpy()
    except pa.ArrowException:
        bad_row = next(i for i, value in enumerate(text.to_pylist()) if not _castable(value, kind))
        raise InputError(
            f"{path}: row {bad_row + 2}: {name} {text[bad_row].as_py()!r} is not a number of type {kind}: correct it"
        ) from None


def _castable(value: str, kind: pa.DataType) -> bool:
    try:
        pa.array([value]).cast(kind)
    except pa.ArrowException:
        return False
    return True


def _split_codes(path: Path, text: Sequence | None) -> np.ndarray | None:
    if text is None:
        return None
    which = pc.index_in(text, value_set=pa.array(list(SPLIT_CODES)))
    if which.null_count:
        row = int(np.argmax(which.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"{path}: row {row + 2}: split {text[row].as_py()!r}: write train, eval or nothing")
    return np.array(list(SPLIT_CODES.values()), np.int8)[which.to_numpy()]
