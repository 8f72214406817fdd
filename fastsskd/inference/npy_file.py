"""A ``.npy`` file that grows row by row and is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np

from fastsskd.errors import InputError


class NpyFile:
    """A float32 table being written; a context manager. An error inside it leaves no file.

    Args:
        path: of the file.
        row_shape: of one row.

    Attributes:
        num_rows: so far.

    Raises:
        InputError: it cannot be written; also from the methods.
    """

    def __init__(self, path: Path, row_shape: tuple[int, ...]):
        self.path, self.row_shape, self.num_rows = path, row_shape, 0
        self._temporary = path.with_name(f".{path.name}.tmp")
        try:
            self._file = open(self._temporary, "wb")  # noqa: SIM115
            self._write_header()
        except OSError as error:
            raise self._cannot(error) from None
        self._start = self._file.tell()

    def append(self, rows: np.ndarray) -> None:
        """Add ``(n, *row_shape)`` rows."""
        try:
            self._file.write(np.ascontiguousarray(rows, np.float32).data)
        except OSError as error:
            raise self._cannot(error) from None
        self.num_rows += len(rows)

    def __enter__(self) -> NpyFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._file as file:
            if kind is None:
                file.seek(0)
                self._write_header()  # NumPy leaves room for the number of rows
                assert file.tell() == self._start
        if kind is None:
            os.replace(self._temporary, self.path)
        else:
            self._temporary.unlink(missing_ok=True)

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.num_rows, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def _cannot(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written ({error.strerror or error}); choose another --out")
