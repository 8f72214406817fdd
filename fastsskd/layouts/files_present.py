"""Which files are there: folder listings only, never one system call per file.

Asking for 2 M files one by one takes minutes on a network disk; listing the folders that hold them takes seconds.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastsskd.errors import InputError

# Everything that people store sounds in. What the loader cannot decode (mp3, m4a, webm ...) is listed too: `pack` can.
AUDIO_SUFFIXES = frozenset(
    (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".mp3", ".m4a", ".aac")
) | {".mp4", ".webm", ".mka", ".mkv", ".wma", ".au", ".caf", ".w64", ".amr", ".3gp", ".mp2", ".ac3", ".wv", ".ape"}
AUDIO_SUFFIXES |= {".m4b", ".mov", ".avi", ".mpg", ".mpeg"}


def scan_audio(folder: Path) -> list[str]:
    """Paths, relative to `folder` and with `/`, of all audio files at any depth, sorted.

    Hidden files and folders and macOS archives' `__MACOSX` are passed over; links to folders are followed once.

    Raises:
        InputError: a folder that cannot be read: its clips must not go missing in silence.
    """
    found: list[str] = []
    pending, seen_links = [("", str(folder))], set()
    while pending:
        prefix, path = pending.pop()
        for entry in _entries(path, may_be_missing=False):
            name = entry.name
            if name[0] == "." or name == "__MACOSX":
                continue
            if entry.is_dir():
                if entry.is_symlink():  # a link may point at a folder above itself
                    real = os.path.realpath(entry.path)
                    if real in seen_links or str(folder.absolute()).startswith(real):
                        continue
                    seen_links.add(real)
                pending.append((f"{prefix}{name}/", entry.path))
            elif os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:
                found.append(prefix + name)
    return sorted(found)


def keep_present(paths: pa.Array | Sequence[str], root: Path, *, listed_in: Path) -> tuple[np.ndarray, list[str]]:
    """Split listed files into those there and those not.

    Args:
        paths: strings, relative to `root` or absolute.
        root: folder that relative paths start from.
        listed_in: file that lists them, for the error.

    Returns:
        (n,) bool, True = there; and the names of the others.

    Raises:
        InputError: not one of them is there.
    """
    paths = paths if isinstance(paths, pa.Array) else pa.array(paths, pa.string())
    split = pc.extract_regex(paths, r"(?s)^(?P<folder>.*/)?(?P<name>[^/]*)$")
    folders = split.field("folder").dictionary_encode()
    codes = folders.indices.to_numpy(zero_copy_only=False)
    names = split.field("name")
    there = np.zeros(len(paths), bool)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(folders.dictionary) + 1))
    for code, folder in enumerate(folders.dictionary.to_pylist()):
        rows = order[bounds[code] : bounds[code + 1]]
        entries = _entries(str(root / folder), may_be_missing=True)
        listing = pa.array([entry.name for entry in entries if entry.is_file()], pa.string())
        there[rows] = pc.is_in(names.take(pa.array(rows)), value_set=listing).to_numpy(zero_copy_only=False)
    absent = paths.filter(pa.array(~there)).to_pylist()
    if len(paths) and not there.any():
        raise InputError(
            f"{listed_in}: none of the {len(paths)} files it lists is under {root} (first: {absent[0]}): "
            "check the paths, or put the list beside its audio"
        )
    return there, absent


def _entries(path: str, *, may_be_missing: bool) -> Iterator[os.DirEntry]:
    """Entries of a folder; none when it may be missing and is, or is a file."""
    try:
        with os.scandir(path) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError) as error:
        if not may_be_missing:
            raise InputError(f"{path}: no such folder ({error.strerror}): check the path") from None
    except OSError as error:
        raise InputError(f"{path}: the folder cannot be read ({error.strerror}): check its permissions") from None
