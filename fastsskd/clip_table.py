"""The in-memory table of clips: what every other part of the trainer means by "a manifest".

A `Manifest` is an immutable view of an Arrow table plus an optional row selection. Nothing is ever copied out of the
table until it is asked for, so a memory-mapped table of 2 M clips costs a rank almost nothing and all ranks of a node
share its pages. Reading and writing it on disk is `fastsskd.manifest`; making one from a data set is
`fastsskd.layouts.index`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastsskd.errors import InputError

SPLIT_NONE, SPLIT_TRAIN, SPLIT_EVAL = 0, 1, 2
WHOLE_FILE = (0.0, -1.0)
"""The segment of a clip that is a whole file: start 0 s, no end."""
ALL_BYTES = (0, -1)
"""The extent of a clip that has a file of its own: first byte 0, no end."""
PACKED_MANIFEST = "packed.manifest"
"""Name of the manifest in a folder that `fastsskd pack` made."""
PACKED = "pack"
"""The source of a manifest that `fastsskd pack` made: each clip was decoded and checked, and the manifest lies beside
the shards and moves with them."""
MAX_ABSENT_NAMES = 1000
BLOCK = 1 << 16
MAX_DENSE_LABELS = 1 << 28
"""`label_array` of a multi-label set refuses to make more values than this (1 GiB of float32)."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique
        ("path", pa.string()),  # file that holds the clip, relative to the root where possible
        ("offset", pa.int64()),  # first byte of the clip's own file inside that file, not 0 in a tar shard
        ("size", pa.int64()),  # bytes of it, -1 = all of the file
        ("labels", pa.list_(pa.int16())),  # empty = unlabelled
        ("fold", pa.int16()),  # 0 = none
        ("split", pa.int8()),  # 0 none, 1 train, 2 eval
        ("start", pa.float32()),  # seconds inside the file
        ("end", pa.float32()),  # seconds, -1 = to the end
        (
            "weight",
            pa.float32(),
        ),  # how often training draws it, if it draws by weight; 1 = as any other
        ("bad", pa.string()),  # why the clip must not be used, "" = good
    ]
)


class Manifest:
    """Immutable view of a table of clips; selecting rows shares the table.

    Attributes:
        table: the Arrow table behind the view (`SCHEMA`); all rows, selected or not.
        classes: class names in label-id order; empty for an unlabelled set.
        multi_label: whether a clip may carry several labels.
        root: folder that relative paths start from.
        source: the layout it was read from ("folder", "esc50", ...).
        absent: names of listed files that were not there, at most `MAX_ABSENT_NAMES` of them.
        num_absent: how many listed files were not there.
        left_out: rows that `manifest.split` dropped because they were marked bad.
    """

    def __init__(
        self,
        table: pa.Table,
        *,
        classes: Sequence[str] = (),
        multi_label: bool = False,
        root: str | Path = "/",
        source: str = "",
        absent: Sequence[str] = (),
        num_absent: int | None = None,
        left_out: int = 0,
        rows: np.ndarray | None = None,
    ):
        self.table = table
        self.classes = tuple(classes)
        self.multi_label = bool(multi_label)
        self.root = Path(root)
        self.source = source
        self.absent = list(absent[:MAX_ABSENT_NAMES])
        self.num_absent = len(absent) if num_absent is None else num_absent
        self.left_out = left_out
        self._rows = rows
        # One contiguous array a column: item access then needs no search for the chunk.
        self._keys, self._paths, self._labels, self._bad = (
            one_chunk(table.column(name)) for name in ("key", "path", "labels", "bad")
        )
        self._offsets, self._sizes, self._starts, self._ends = (
            one_chunk(table.column(name)).to_numpy() for name in ("offset", "size", "start", "end")
        )
        self._label_offsets = self._labels.offsets.to_numpy(zero_copy_only=len(table) > 0)
        self._label_values = self._labels.values.to_numpy(zero_copy_only=len(table) > 0)

    def __len__(self) -> int:
        return len(self.table) if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        kind = "multi-label" if self.multi_label else "single-label"
        return f"Manifest({len(self)} clips, {len(self.classes)} classes, {kind}, root={str(self.root)!r})"

    def _row(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        i = int(i) % len(self)
        return i if self._rows is None else int(self._rows[i])

    def _column(self, name: str) -> np.ndarray:
        values = one_chunk(self.table.column(name)).to_numpy(zero_copy_only=False)
        return values if self._rows is None else _read_only(values[self._rows])

    def key(self, i: int) -> str:
        """Unique name of clip `i`."""
        return self._keys[self._row(i)].as_py()

    def path(self, i: int) -> Path:
        """Absolute path of the file that holds clip `i`."""
        return self.root / self.file_name(i)

    def file_name(self, i: int) -> str:
        """The same as the manifest has it: relative to `root`, or absolute."""
        return self._paths[self._row(i)].as_py()

    def bad(self, i: int) -> str:
        """Why clip `i` must not be used; "" = good."""
        return self._bad[self._row(i)].as_py()

    def labels(self, i: int) -> np.ndarray:
        """Label ids of clip `i`: (number of labels,) int64, empty = unlabelled."""
        row = self._row(i)
        return self._label_values[self._label_offsets[row] : self._label_offsets[row + 1]].astype(np.int64)

    def extent(self, i: int) -> tuple[int, int]:
        """Where in `path(i)` the clip's own (encoded) file lies: first byte and number of bytes, or `ALL_BYTES`."""
        row = self._row(i)
        return int(self._offsets[row]), int(self._sizes[row])

    def segment(self, i: int) -> tuple[float, float]:
        """Start and end of clip `i` inside its file, in seconds; `WHOLE_FILE` = all of it."""
        row = self._row(i)
        return float(self._starts[row]), float(self._ends[row])

    def extents(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`extent` of some clips: (k,) int64 each."""
        rows = self._table_rows(indices)
        return self._offsets[rows], self._sizes[rows]

    def segments(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`segment` of some clips: (k,) float32 each."""
        rows = self._table_rows(indices)
        return self._starts[rows], self._ends[rows]

    @cached_property
    def folds(self) -> np.ndarray:
        """(n,) int16 cross-validation fold, 0 = none."""
        return self._column("fold")

    @cached_property
    def splits(self) -> np.ndarray:
        """(n,) int8: `SPLIT_NONE`, `SPLIT_TRAIN` or `SPLIT_EVAL`."""
        return self._column("split")

    @cached_property
    def weights(self) -> np.ndarray:
        """(n,) float32 sampling weight of each clip, as the data set's list gives it; 1 where none does."""
        return self._column("weight")

    @cached_property
    def good(self) -> np.ndarray:
        """(n,) bool, False where the clip is marked bad."""
        lengths = pc.binary_length(self._bad).to_numpy(zero_copy_only=False)
        return _read_only((lengths if self._rows is None else lengths[self._rows]) == 0)

    def num_labels(self, indices: np.ndarray | None = None) -> np.ndarray:
        """(k,) int64, labels per clip, of all clips or of `indices`."""
        rows = self._table_rows(indices)
        return (self._label_offsets[rows + 1] - self._label_offsets[rows]).astype(np.int64)

    def label_of(self, indices: np.ndarray) -> np.ndarray:
        """Training targets of some clips.

        Args:
            indices: (k,) int clip numbers.

        Returns:
            Single-label: (k,) int64, -1 = unlabelled. Multi-label: (k, C) float32 multi-hot, all 0 = unlabelled.
        """
        values, owner = self._label_pairs(self._table_rows(indices))
        if self.multi_label:
            target = np.zeros((len(indices), len(self.classes)), np.float32)
            target[owner, values] = 1.0
            return target
        ids = np.full(len(indices), -1, np.int64)
        ids[owner] = values
        return ids

    def first_labels(self) -> np.ndarray:
        """(n,) int64, the first label of every clip, -1 = unlabelled."""
        rows = self._table_rows(None)
        starts, has_label = self._label_offsets[rows], self.num_labels() > 0
        first = np.full(len(rows), -1, np.int64)
        first[has_label] = self._label_values[starts[has_label]]
        return first

    def label_array(self) -> np.ndarray:
        """`label_of` all clips; a multi-label set above `MAX_DENSE_LABELS` values is a ValueError."""
        if self.multi_label and len(self) * len(self.classes) > MAX_DENSE_LABELS:
            raise ValueError(f"{len(self)} x {len(self.classes)} labels at once: use label_of(indices) batch by batch")
        return self.label_of(np.arange(len(self)))

    def class_counts(self) -> np.ndarray:
        """(C,) int64, number of clips that carry each class."""
        counts = np.zeros(len(self.classes), np.int64)
        for rows in self._row_blocks():
            counts += np.bincount(self._label_pairs(rows)[0], minlength=len(self.classes))
        return counts

    def sum_over_labels(self, class_weight: np.ndarray) -> np.ndarray:
        """(n,) float64: per clip, the sum of `class_weight` (C,) over its labels (balanced sampling's weights)."""
        class_weight = np.asarray(class_weight, np.float64)
        sums = []
        for rows in self._row_blocks():
            values, owner = self._label_pairs(rows)
            sums.append(np.bincount(owner, weights=class_weight[values], minlength=len(rows)))
        return np.concatenate(sums) if sums else np.zeros(0)

    def select(self, which: np.ndarray) -> "Manifest":
        """View of some clips, in the order given: `which` is (k,) int indices or an (n,) bool mask."""
        which = np.asarray(which)
        if which.dtype == bool:
            if which.shape != (len(self),):
                raise ValueError(f"mask of shape {which.shape} for {len(self)} clips")
            which = np.flatnonzero(which)
        return self.replace(rows=_read_only(self._table_rows(which).copy()))

    def with_classes(self, classes: Sequence[str]) -> "Manifest":
        """Same clips with label ids counted along `classes` (a checkpoint's, say), matched by name.

        Raises:
            InputError: a class that clips of this manifest carry is not among `classes`.
        """
        classes = tuple(classes)
        if classes == self.classes:
            return self
        counts = self.class_counts()
        missing = [name for name, n in zip(self.classes, counts, strict=True) if n and name not in classes]
        if missing:
            raise InputError(
                f"class {missing[0]!r} ({len(missing)} in all) of {self.root} is not among the {len(classes)} classes "
                f"expected ({', '.join(classes[:3])}, ...): use a data set with the same class names"
            )
        position = {name: i for i, name in enumerate(classes)}
        new_id = np.array([position.get(name, 0) for name in self.classes], np.int16)
        values = pa.array(new_id[self._label_values] if len(self._label_values) else [], pa.int16())
        labels = pa.ListArray.from_arrays(self._labels.offsets, values)
        table = self.table.set_column(SCHEMA.get_field_index("labels"), SCHEMA.field("labels"), labels)
        return self.replace(table=table, classes=classes)

    def mark(self, reasons: Mapping[int, str]) -> "Manifest":
        """Same clips, but why clip `i` must not be used is now `reasons[i]`; "" = it is good."""
        column = one_chunk(self.table.column("bad")).to_numpy(zero_copy_only=False).copy()
        column[self._table_rows(np.array(list(reasons), np.int64))] = list(reasons.values())
        index = SCHEMA.get_field_index("bad")
        return self.replace(table=self.table.set_column(index, SCHEMA.field("bad"), pa.array(column, pa.string())))

    def fingerprint(self) -> str:
        """16 hex digits over keys and paths in order: equal means a resumed run sees the same clips in the same order.

        The root is not part of it: a data set that moved to another disk is still the same.
        """
        digest = hashlib.blake2b(digest_size=8)
        for rows in self._row_blocks():
            for column in (self._keys, self._paths):
                array = column.take(pa.array(rows))
                offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
                digest.update(np.diff(offsets).tobytes())
                digest.update(memoryview(array.buffers()[2] or b"")[offsets[0] : offsets[-1]])
        return digest.hexdigest()

    def materialise(self) -> pa.Table:
        """Table of the selected rows only, in one chunk per column."""
        return (self.table if self._rows is None else self.table.take(pa.array(self._rows))).combine_chunks()

    def _table_rows(self, indices: np.ndarray | None) -> np.ndarray:
        if indices is None:
            return np.arange(len(self.table)) if self._rows is None else self._rows
        indices = np.asarray(indices, np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"clips {indices.min()}..{indices.max()} of {len(self)}")
        return indices if self._rows is None else self._rows[indices]

    def _row_blocks(self) -> Iterator[np.ndarray]:
        """Table rows of the view, `BLOCK` at a time: passes over 2 M clips then need no large temporaries."""
        for start in range(0, len(self), BLOCK):
            stop = min(start + BLOCK, len(self))
            yield np.arange(start, stop) if self._rows is None else self._rows[start:stop]

    def _label_pairs(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every (label id, position among the table `rows`) pair, as two (p,) arrays."""
        starts = self._label_offsets[rows].astype(np.int64)
        counts = self._label_offsets[rows + 1] - starts
        owner = np.repeat(np.arange(len(rows)), counts)
        # Position inside each clip's run of labels: a running count minus where that clip's run began.
        inside = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._label_values[np.repeat(starts, counts) + inside], owner

    def replace(self, **changes) -> "Manifest":
        """Same view with some constructor fields changed."""
        names = ("table", "classes", "multi_label", "root", "source", "absent", "num_absent", "left_out")
        fields = {name: getattr(self, name) for name in names} | {"rows": self._rows} | changes
        return Manifest(fields.pop("table"), **fields)


def one_chunk(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The column as one contiguous array, without a copy where it is one already."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _read_only(values: np.ndarray) -> np.ndarray:
    values.setflags(write=False)
    return values
