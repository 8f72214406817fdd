"""One decorator for every compiled function: no GIL, and machine code that is kept on disk.

Numba keeps compiled code beside the source. Where that folder is read-only (a system-wide install, a container image)
it uses the user's cache folder, and where neither can be written we compile in every process. The first call then takes
seconds; each of the two fall-backs is therefore announced by one warning.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import numba

_announced: set[str] = set()


def njit(function: Callable) -> Callable:
    """Compile ``function`` on its first call, without the GIL, and cache it on disk if any place allows.

    Floating-point rules stay strict: NaN and infinity keep their meaning, sums keep their order.
    """
    try:
        compiled = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # numba: "cannot cache function: no locator available"
        _announce("no folder for compiled kernels is writable; set NUMBA_CACHE_DIR to save seconds at every start")
        return numba.njit(nogil=True, error_model="numpy")(function)
    folder = cache_folder(compiled)
    if folder.parent != Path(function.__code__.co_filename).resolve().parent:
        _announce(f"compiled kernels are kept in {folder.parent}, because the package's own folder is read-only")
    return compiled


def cache_folder(compiled: Callable) -> Path | None:
    """Folder of a compiled function's machine code, or None where there is none."""
    path = compiled.stats.cache_path
    return Path(path).resolve() if path else None


def _announce(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, stacklevel=3)


def inlined(function: Callable) -> Callable:
    """A step of a compiled function."""
    return numba.njit(nogil=True, inline="always")(function)
