"""Files that are there whole or not at all, and survive a power cut."""

import os
from pathlib import Path


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
