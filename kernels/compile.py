"""The decorators of every compiled function: no GIL, and machine code that is kept on disk.

The code lies beside the source; where that is read-only (a system-wide install, a container image) in the user's cache;
and where neither can be written every process compiles anew, which takes seconds. Each of the two is announced by one
warning. NUMBA_CACHE_DIR chooses another folder.

Numba discards cached code when the file of the function changes, but not when a function that it calls changes in
another file. The folder's name therefore carries a digest of all sources of this package.
"""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numba

_PACKAGE = Path(__file__).resolve().parent


def _choose_folder() -> Path | None:
    """A writable folder for this version of the sources, or None; warns where it is not the usual one."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_PACKAGE.glob("*.py")))).hexdigest()[:12]
    beside, user = _PACKAGE / "__pycache__", Path(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")))
    for base in [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else [beside, user]:
        folder = base / f"fastsskd_kernels-{digest}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        if base == user:
            warnings.warn(f"compiled kernels are kept in {folder}, because {_PACKAGE} is read-only", stacklevel=2)
        return folder
    warnings.warn(
        "no folder for compiled kernels is writable; set NUMBA_CACHE_DIR to save seconds at every start", stacklevel=2
    )
    return None


cache_folder = _choose_folder()


def njit(function: Callable, relax: frozenset[str] = frozenset(), *, parallel: bool = False) -> Callable:
    """Compile ``function`` on its first call, without the GIL, and keep the machine code in ``cache_folder``.

    Floating-point rules stay strict, but for those of LLVM's fast-math flags that ``relax`` names: NaN and infinity
    keep their meaning, sums keep their order.
    """
    options = {"nogil": True, "fastmath": set(relax), "parallel": parallel}
    if cache_folder is None:
        return numba.njit(**options)(function)
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache_folder)
    try:
        return numba.njit(cache=True, **options)(function)
    finally:
        numba.config.CACHE_DIR = before


def njit_fused(function: Callable) -> Callable:
    """As ``njit`` for a polynomial: a product and a sum may become one instruction, which rounds once."""
    return njit(function, frozenset({"contract"}))


def njit_parallel(function: Callable) -> Callable:
    """As ``njit`` for a function whose ``prange`` is shared among threads: a training step's, not a loader's."""
    return njit(function, parallel=True)


def njit_reordered(function: Callable) -> Callable:
    """As ``njit`` for a sum whose terms may be added in any order, which lets it use SIMD lanes."""
    return numba.njit(nogil=True, fastmath={"reassoc", "contract"}, inline="never")(function)


def inlined(function: Callable) -> Callable:
    """A step of one or two compiled functions: compiled as a part of each.

    A call between compiled functions makes numba optimise the callee again inside each caller, so deep chains of calls
    are slow to compile; steps that only call other steps are inlined instead.
    """
    return numba.njit(nogil=True, inline="always")(function)
