"""The decorators of every compiled function: no GIL, and machine code that is kept on disk.

Numba keeps compiled code beside the source. Where that folder is read-only (a system-wide install, a container image)
it uses the user's cache folder, and where neither can be written every process compiles anew, which takes seconds. Each
of the two is announced by one warning. NUMBA_CACHE_DIR chooses another folder.
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
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba: "cannot cache function: no locator available"
        _announce("no folder for compiled kernels is writable; set NUMBA_CACHE_DIR to save seconds at every start")
        return numba.njit(nogil=True)(function)
    package, folder = Path(__file__).resolve().parent, cache_folder(compiled)
    if not numba.config.CACHE_DIR and package not in folder.parents:
        _announce(f"compiled kernels are kept in {folder}, because {package} is read-only")
    return compiled


def inlined(function: Callable) -> Callable:
    """A step of one or two compiled functions: compiled as a part of each.

    A call between compiled functions makes numba optimise the callee again inside each caller, so deep chains of calls
    are slow to compile; steps that only call other steps are inlined instead.
    """
    return numba.njit(nogil=True, inline="always")(function)


def cache_folder(compiled: Callable) -> Path | None:
    """Folder of a compiled function's machine code, or None where there is none."""
    path = compiled.stats.cache_path
    return Path(path).resolve() if path else None


def _announce(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, stacklevel=3)
