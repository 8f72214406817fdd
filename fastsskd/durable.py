"""Files that are there whole or not at all, survive a power cut, and have one writer."""

import fcntl
import hashlib
import os
from pathlib import Path

_CHUNK = 1 << 22


def write_text(path: Path, text: str, temporary: Path | None = None) -> None:
    """Write a file under another name, have it on the disk, then rename it into place.

    Args:
        temporary: the other name, on the same disk; default: hidden, beside it.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Claim an open file or folder for as long as it stays open; False = another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network disk without locks
        pass
    return True


def sha256(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
