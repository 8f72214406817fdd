"""From plain columns (paths, labels, folds ...) to a manifest: the last step of every reader of a data set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastsskd.clip_table import ALL_BYTES, SCHEMA, WHOLE_FILE, Manifest, one_chunk
from fastsskd.errors import InputError


def from_columns(
    paths,
    *,
    root: str | Path,
    keys=None,
    labels=None,
    classes: Sequence[str] = (),
    multi_label: bool = False,
    folds=None,
    splits=None,
    starts=None,
    ends=None,
    offsets=None,
    sizes=None,
    weights=None,
    source: str = "",
    absent: Sequence[str] = (),
) -> Manifest:
    """Manifest from plain columns of equal length.

    Args:
        paths: strings, relative to `root` or absolute.
        root: folder that relative paths start from.
        keys: unique strings; default: the paths.
        labels: None, (n,) int with -1 = unlabelled, or an Arrow list array of label ids.
        classes: names in label-id order.
        multi_label: whether clips may carry several labels.
        folds: (n,) int, default 0. splits: (n,) int codes, default 0.
        starts: (n,) seconds, default 0. ends: (n,) seconds, default -1.
        offsets: (n,) first byte of each clip inside its file, default 0. sizes: (n,) its bytes, default -1 = all.
        weights: (n,) sampling weights, default 1.
        source: name of the layout.
        absent: names of listed files that are not there.

    Raises:
        InputError: two clips have the same key.
    """
    paths = strings(paths)
    n = len(paths)
    keys = paths if keys is None else strings(keys)
    _refuse_duplicates(keys, root)
    columns = {
        "key": keys,
        "path": paths,
        "offset": _filled(offsets, n, ALL_BYTES[0], np.int64),
        "size": _filled(sizes, n, ALL_BYTES[1], np.int64),
        "labels": _label_lists(labels, n),
        "fold": _filled(folds, n, 0, np.int16),
        "split": _filled(splits, n, 0, np.int8),
        "start": _filled(starts, n, WHOLE_FILE[0], np.float32),
        "end": _filled(ends, n, WHOLE_FILE[1], np.float32),
        "weight": _filled(weights, n, 1.0, np.float32),
        "bad": pa.repeat("", n),
    }
    table = pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)
    return Manifest(
        table, classes=classes, multi_label=multi_label, root=Path(root).absolute(), source=source, absent=absent
    )


def _filled(values, n: int, default: float, dtype: type) -> pa.Array:
    return pa.array(np.full(n, default, dtype) if values is None else np.asarray(values, dtype))


def _label_lists(labels, n: int) -> pa.ListArray:
    if labels is None:
        labels = np.full(n, -1)
    if isinstance(labels, pa.ListArray):
        return labels.cast(pa.list_(pa.int16()))
    labels = np.asarray(labels)
    has_label = labels >= 0
    offsets = np.concatenate([[0], np.cumsum(has_label)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(labels[has_label].astype(np.int16)))


def _refuse_duplicates(keys: pa.Array, root: str | Path) -> None:
    if pc.count_distinct(keys).as_py() == len(keys):
        return
    counts = pc.value_counts(keys)
    most = counts[int(np.argmax(counts.field("counts").to_numpy()))].as_py()
    raise InputError(
        f"{root}: {most['counts']} clips have the key {most['values']!r}; keys must be unique: rename or remove one"
    )


def strings(values) -> pa.Array:
    """One contiguous Arrow string array from a sequence or another Arrow array."""
    if isinstance(values, pa.ChunkedArray):
        values = one_chunk(values)
    return values.cast(pa.string()) if isinstance(values, pa.Array) else pa.array(values, pa.string())


def split_names(text: pa.Array, separator: str) -> tuple[pa.Array, pa.Array]:
    """Names in strings such as `dog;car`: blanks around them and empty ones are dropped.

    Args:
        text: (n,) strings. separator: what stands between names.

    Returns:
        (p,) all names in order, and (n + 1,) int32 offsets of each row's names among them.
    """
    parts = pc.split_pattern(text, separator)
    owner = pc.list_parent_indices(parts).to_numpy()
    names = pc.utf8_trim_whitespace(parts.flatten())
    named = pc.not_equal(names, "")
    counts = np.bincount(owner[named.to_numpy(zero_copy_only=False)], minlength=len(text))
    return names.filter(named), pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
