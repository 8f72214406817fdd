"""Any data set a user has -> one manifest. `build` looks at what is there and picks the reader.

| layout | what is recognised |
|---|---|
| ESC-50, ESC-10 | `meta/*.csv` with `filename,fold,target,category`, and `audio/` |
| AudioSet | `*_segments.csv`; audio named `<ytid>.*` or `Y<ytid>.*` below; `class_labels_indices.csv` beside it |
| VGGSound | `vggsound.csv`: `ytid,start,label,train|test`; audio named `<ytid>_<start, 6 digits>.*` or `<ytid>.*` |
| AST JSON | `{"data": [{"wav": path, "labels": "/m/a,/m/b"}]}`; `*class_labels_indices.csv` beside it gives names |
| packed | `packed.manifest`, written by `fastsskd pack` |
| WebDataset | tar shards of `key.wav|flac|ogg...` with `key.json` or `key.cls`, see `fastsskd.layouts.tar` |
| folder | `class_name/any/depth/clip.ext`; `train/class_name/...` with `eval/` or `test/`; clips alone = unlabelled |
| CSV | a manifest written by hand, see `fastsskd.manifest` |

Files that a list names and that are not there are left out, counted and named (`Manifest.absent`).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from fastsskd import manifest
from fastsskd.clip_columns import from_columns
from fastsskd.clip_table import PACKED_MANIFEST, SPLIT_EVAL, SPLIT_TRAIN, Manifest
from fastsskd.errors import InputError
from fastsskd.layouts import listed as listed_layouts
from fastsskd.layouts import tar as tar_layout
from fastsskd.layouts.files_present import scan_audio

SPLIT_FOLDERS = {
    "train": SPLIT_TRAIN,
    "training": SPLIT_TRAIN,
    "eval": SPLIT_EVAL,
    "test": SPLIT_EVAL,
    "val": SPLIT_EVAL,
    "valid": SPLIT_EVAL,
    "validation": SPLIT_EVAL,
}


def build(src: str | Path) -> Manifest:
    """Read a data set of any known layout.

    Args:
        src: a folder, or the list (.csv, .json) of one of the layouts above.

    Raises:
        InputError: nothing there, an unknown kind of list, no audio, or a damaged list.
    """
    src = Path(src)
    if not src.exists():
        raise InputError(f"{src}: no such file or folder: give the folder that holds the audio, or its list")
    if src.is_dir():
        return _build_folder(src)
    if src.suffix.lower() == ".json":
        return listed_layouts.read_ast_json(src)
    if src.suffix.lower() == ".csv":
        return _build_csv(src)
    if src.suffix.lower() == ".tar":
        return tar_layout.read_webdataset([src], src.parent, SPLIT_FOLDERS)
    return manifest.load(src)


def _build_folder(folder: Path) -> Manifest:
    if (folder / PACKED_MANIFEST).exists():
        return manifest.load(folder / PACKED_MANIFEST)
    esc = [path for path in sorted(folder.glob("meta/*.csv")) if _is_esc(path)]
    if esc:
        return read_esc(esc[0])
    segments = _lists_below(folder, "*segments*.csv", listed_layouts.is_audioset)
    if segments:
        return listed_layouts.read_audioset(segments, folder)
    vggsound = _lists_below(folder, "vggsound*.csv", listed_layouts.is_vggsound)
    if vggsound:
        return listed_layouts.read_vggsound(vggsound[0], folder)
    paths = scan_audio(folder)
    shards = [] if paths else tar_layout.find_shards(folder)
    if shards:
        return tar_layout.read_webdataset(shards, folder, SPLIT_FOLDERS)
    return read_class_folders(folder, paths)


def _build_csv(path: Path) -> Manifest:
    if _is_esc(path):
        return read_esc(path)
    first = _first_line(path)
    if listed_layouts.is_audioset(first):
        return listed_layouts.read_audioset([path], None)
    if listed_layouts.is_vggsound(first):
        return listed_layouts.read_vggsound(path, None)
    return manifest.load(path)


def _lists_below(folder: Path, pattern: str, is_one: Callable[[str], bool]) -> list[Path]:
    """Lists in the folder itself, else in the folders directly inside it, whose first line is such a list's."""
    paths = sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))
    return [path for path in paths if is_one(_first_line(path))]


def _first_line(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline(1000).strip()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check its permissions") from None


def _is_esc(path: Path) -> bool:
    return {"filename", "fold", "target", "category"} <= set(_first_line(path).split(","))


def read_class_folders(folder: Path, paths: list[str]) -> Manifest:
    """`class_name/any/depth/clip.ext`, classes sorted by name; clips directly in `folder` are unlabelled.

    When every top folder is named like a split (`train`, `eval`, `test` ...), classes are the folders inside those.

    Args:
        folder: the data set.
        paths: its audio files, see `scan_audio`.

    Raises:
        InputError: no audio file at any depth.
    """
    if not paths:
        raise InputError(f"{folder}: no audio file found ({_what_is_there(folder)}): give a folder of audio clips")
    # Empty where the clip does not lie that deep.
    tops = _level(paths, 0)
    splits = None
    names = tops
    used = {top for top in tops if top}
    if used and "" not in tops and {top.lower() for top in used} <= SPLIT_FOLDERS.keys():
        splits = np.array([SPLIT_FOLDERS[top.lower()] for top in tops], np.int8)
        names = _level(paths, 1)
    classes = sorted(set(names) - {""})
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    labels = np.fromiter((number[name] for name in names), np.int64, len(names))
    return from_columns(paths, root=folder, labels=labels, classes=classes, splits=splits, source="folder")


def _level(paths: list[str], depth: int) -> list[str]:
    """Name of each path's folder at `depth`, "" where the file itself comes before that."""
    parts = (path.split("/", depth + 1) for path in paths)
    return [part[depth] if len(part) > depth + 1 else "" for part in parts]


def _what_is_there(folder: Path) -> str:
    suffixes = sorted({path.suffix.lower() or path.name for path in folder.glob("*") if not path.name.startswith(".")})
    if {".gz", ".tgz", ".zst", ".bz2", ".xz"} & set(suffixes):
        return "compressed archives must be unpacked first, of shards only the compression"
    return f"found only {', '.join(suffixes[:5])}" if suffixes else "it is empty"


def read_esc(path: Path) -> Manifest:
    """ESC-50 or a part of it (ESC-10): `meta/esc50.csv`, clips in `audio/`, folds kept.

    Class ids are counted over the classes present, in ESC's order. The suffix in the list may differ from the file's.

    Raises:
        InputError: a damaged list, or none of its clips in `audio/`.
    """
    root = path.absolute().parent.parent
    try:
        table = csv.read_csv(path)
        stems = pc.replace_substring_regex(table["filename"].combine_chunks(), r"\.[^.]*$", "")
        targets, folds = (table[name].to_numpy().astype(np.int64) for name in ("target", "fold"))
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{path}: damaged ({str(error).splitlines()[0]}): download the list again") from None
    audio = listed_layouts.match_stems(scan_audio(root / "audio"), [stems])
    there = audio.is_valid().to_numpy(zero_copy_only=False)
    if not there.any():
        raise InputError(f"{path}: none of its {len(there)} clips is in {root / 'audio'}: put the clips there")
    category = dict(zip(targets.tolist(), table["category"].to_pylist(), strict=True))
    present, labels = np.unique(targets[there], return_inverse=True)
    keep = pa.array(there)
    return from_columns(
        pc.binary_join_element_wise("audio/", audio.filter(keep), ""),
        root=root,
        keys=stems.filter(keep),
        labels=labels,
        classes=[category[target] for target in present.tolist()],
        folds=folds[there],
        source="esc50",
        absent=table["filename"].filter(pa.chunked_array([~keep.to_numpy(zero_copy_only=False)])).to_pylist(),
    )
