"""A table on disk, of rows of equal size: a ``.npy`` file that is written and read a few rows at a time.

Through calls rather than a memory map: a full disk or one that fails is then an error with a name, where a map ends the
process; and threads that read do not hold each other up.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastsskd.errors import InputError


class RowFile:
    """An open file.

    Args:
        path: made by :meth:`create`.
        writable: or only read.

    Attributes:
        shape: of the table; its last dimension is a row, the others count rows.
        dtype: of its numbers.
        row_bytes: of one row.

    Raises:
        InputError: absent, not such a file, or cut short.
    """

    def __init__(self, path: Path, *, writable: bool = False):
        self.path = path
        try:
            self._file = open(path, "r+b" if writable else "rb", buffering=0)  # noqa: SIM115
            np.lib.format.read_magic(self._file)
            self.shape, in_columns, self.dtype = np.lib.format.read_array_header_1_0(self._file)
            self._start, there = self._file.tell(), os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
        except ValueError:
            raise InputError(f"{path}: not a table that we wrote, or damaged; copy or make it again") from None
        self.row_bytes = self.shape[-1] * self.dtype.itemsize
        whole = self._start + int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        if there < whole or in_columns:
            raise InputError(f"{path}: cut short, {there:,} bytes of {whole:,}; copy or make it again")

    @staticmethod
    def create(path: Path, shape: tuple[int, ...], dtype: type) -> None:
        """Write a table of zeros, which takes room on the disk only as its rows are written.

        Raises:
            OSError: it cannot be written.
        """
        dtype = np.dtype(dtype)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """``(n, width)``: some rows, counted through all dimensions but the last.

        Raises:
            InputError: the disk fails, or the file was cut meanwhile.
        """
        values = np.empty((len(rows), self.shape[-1]), self.dtype)
        for place, row in enumerate(rows.tolist()):
            try:
                count = os.preadv(self._file.fileno(), [values[place]], self._start + row * self.row_bytes)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read ({error.strerror or error})") from None
            if count < self.row_bytes:
                raise InputError(f"{self.path}: ends before row {row}; it was cut while in use")
        return values

    def read_all(self) -> np.ndarray:
        """The whole table."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return np.fromfile(self.path, self.dtype, count, offset=self._start).reshape(self.shape)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write ``(n, width)`` values to increasing ``rows``; neighbours together.

        Raises:
            OSError: the disk is full or fails.
        """
        values = np.ascontiguousarray(values, self.dtype)
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
            if len(run):
                self._write_all(values[run[0] : run[-1] + 1], self._start + int(rows[run[0]]) * self.row_bytes)

    def _write_all(self, values: np.ndarray, offset: int) -> None:
        left = memoryview(values).cast("B")
        while len(left):  # a disk that fills up takes a part first
            count = os.pwrite(self._file.fileno(), left, offset)
            left, offset = left[count:], offset + count

    def sync(self) -> None:
        """Have what was written on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
