"""Data sets that come as a list of clips beside a heap of files: AudioSet, VGGSound, AST's JSON.

The lists name videos, not files, so audio is matched by the stem of its name. Start and end times in these lists say
where the clip was cut from the video; the audio files are the cut clips, so their segment is the whole file.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from fastsskd.clip_columns import from_columns, split_names
from fastsskd.clip_table import SPLIT_EVAL, SPLIT_TRAIN, Manifest
from fastsskd.errors import InputError
from fastsskd.layouts.files_present import keep_present, scan_audio

VGGSOUND_LINE = r'^(?P<ytid>[^,]+),(?P<start>\d+),(?P<label>"(?:[^"]|"")*"|[^,]*),(?P<split>train|test)\s*$'
AUDIOSET_LINE = r'^(?P<ytid>[^,]+),\s*(?P<start>[\d.]+),\s*(?P<end>[\d.]+),\s*"?(?P<mids>[^"]*)"?\s*$'


def is_audioset(first_line: str) -> bool:
    """Whether a list's first line is that of AudioSet's segment lists."""
    return first_line.startswith("# Segments csv") or first_line.startswith("# YTID")


def is_vggsound(first_line: str) -> bool:
    """Whether a list's first line is `ytid,start,label,train|test`."""
    return pc.match_substring_regex(pa.scalar(first_line), VGGSOUND_LINE).as_py()


def read_audioset(lists: Sequence[Path], audio: Path | None) -> Manifest:
    """AudioSet's `*_segments.csv` lists; a list whose name starts with `eval` is the evaluation side.

    Args:
        lists: one or more segment lists.
        audio: folder to search for `<ytid>.*` or `Y<ytid>.*`; None: the first list's folder, else the one above.

    Raises:
        InputError: a line that is not AudioSet's, a class that the class list lacks, no audio file.
    """
    lines = [_lines(path) for path in lists]
    fields = pc.extract_regex(pa.concat_arrays(lines), AUDIOSET_LINE)
    code = [SPLIT_EVAL if path.name.lower().startswith("eval") else SPLIT_TRAIN for path in lists]
    splits = np.repeat(np.array(code, np.int8), [len(part) for part in lines])
    _refuse_odd_lines(lists[0], fields, pa.concat_arrays(lines))
    ytids = fields.field("ytid")
    root, found = _find_audio(lists[0], audio)
    files = match_stems(found, [ytids, pc.binary_join_element_wise("Y", ytids, "")])
    there = _refuse_none_there(lists[0], files, root)
    keep = pa.array(there)
    labels, classes = _mid_labels(lists[0], fields.field("mids").filter(keep))
    return from_columns(
        files.filter(keep),
        root=root,
        keys=ytids.filter(keep),
        labels=labels,
        classes=classes,
        multi_label=True,
        splits=splits[there],
        source="audioset",
        absent=ytids.filter(pa.array(~there)).to_pylist(),
    )


def read_vggsound(path: Path, audio: Path | None) -> Manifest:
    """VGGSound's list: `ytid,start,label,train|test`, clips named `<ytid>_<start, 6 digits>.*` or `<ytid>.*`.

    Raises:
        InputError: a line of another kind, no audio file.
    """
    lines = _lines(path)
    fields = pc.extract_regex(lines, VGGSOUND_LINE)
    _refuse_odd_lines(path, fields, lines)
    ytids = fields.field("ytid")
    stems = pc.binary_join_element_wise(ytids, pc.utf8_lpad(fields.field("start"), 6, "0"), "_")
    root, found = _find_audio(path, audio)
    files = match_stems(found, [stems, ytids])
    there = _refuse_none_there(path, files, root)
    keep = pa.array(there)
    names = pc.replace_substring_regex(fields.field("label").filter(keep), '^"(.*)"$', r"\1")
    names = pc.replace_substring(names, '""', '"')
    classes = sorted(pc.unique(names).to_pylist())
    is_train = pc.equal(fields.field("split"), "train").to_numpy(zero_copy_only=False)[there]
    return from_columns(
        files.filter(keep),
        root=root,
        keys=stems.filter(keep),
        labels=pc.index_in(names, value_set=pa.array(classes)).to_numpy(),
        classes=classes,
        splits=np.where(is_train, SPLIT_TRAIN, SPLIT_EVAL),
        source="vggsound",
        absent=stems.filter(pa.array(~there)).to_pylist(),
    )


def read_ast_json(path: Path) -> Manifest:
    """AST's `{"data": [{"wav": path, "labels": "/m/a,/m/b"}]}`; paths are absolute or relative to the list.

    Sampling weights come from `<name>_weight.csv` beside `<name>.json`, one number a line, if it is there.

    Raises:
        InputError: not that JSON, a class that the class list lacks, weights that do not fit, none of the files there.
    """
    try:
        entries = json.loads(path.read_bytes())["data"]
        wavs = pa.array([entry["wav"] for entry in entries], pa.string())
        mids = pa.array([entry.get("labels", "") for entry in entries], pa.string())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        raise InputError(f'{path}: not AST\'s list {{"data": [{{"wav": ..., "labels": ...}}]}}: correct it') from None
    if not len(wavs):
        raise InputError(f"{path}: lists no clip: give a list with clips")
    root = path.absolute().parent
    there, absent = keep_present(wavs, root, listed_in=path)
    labels, classes = _mid_labels(path, mids.filter(pa.array(there)))
    several = bool(len(labels)) and pc.max(pc.list_value_length(labels)).as_py() > 1
    return from_columns(
        wavs.filter(pa.array(there)),
        root=root,
        labels=labels,
        classes=classes,
        multi_label=several,
        weights=_ast_weights(path, there),
        source="ast_json",
        absent=absent,
    )


def read_weights(path: Path) -> np.ndarray:
    """Sampling weights from a text file, one number a line, as AST's `gen_weight_file.py` writes them: (n,) float64.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        return np.loadtxt(path, np.float64, ndmin=1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not sampling weights, one number a line ({error}): write the file anew") from None


def _ast_weights(path: Path, there: np.ndarray) -> np.ndarray | None:
    """Weights of the clips that are there."""
    file = path.with_name(f"{path.stem}_weight.csv")
    if not file.exists():
        return None
    weights = read_weights(file)
    if weights.shape != there.shape:
        raise InputError(
            f"{file}: {weights.size} weights for the {len(there)} clips of {path.name}: write it anew, or remove it"
        )
    return weights[there]


def match_stems(files: Sequence[str], candidates: Sequence[pa.Array]) -> pa.Array:
    """File of each clip, by the name without folder and suffix.

    Args:
        files: paths of the files there.
        candidates: name arrays of equal length (n,), tried in order.

    Returns:
        (n,) strings, null where no file has any of the clip's names.
    """
    paths = pa.array(files, pa.string())
    stems = pc.replace_substring_regex(paths, r"(?s)^.*/", "")
    stems = pc.replace_substring_regex(stems, r"\.[^.]*$", "")
    where = [pc.index_in(names, value_set=stems) for names in candidates]
    return paths.take(pc.coalesce(*where))


def _lines(path: Path) -> pa.Array:
    """Non-empty lines that do not start with #."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}): download the list again") from None
    return pa.array([line for line in text.splitlines() if line.strip() and line[0] != "#"], pa.string())


def _refuse_odd_lines(path: Path, fields: pa.StructArray, lines: pa.Array) -> None:
    if not len(lines):
        raise InputError(f"{path}: lists no clip: download the list again")
    if fields.null_count:
        odd = lines[int(np.argmax(fields.is_null().to_numpy(zero_copy_only=False)))].as_py()
        raise InputError(f"{path}: line {odd[:80]!r} is not in this list's format: correct or remove it")


def _find_audio(path: Path, audio: Path | None) -> tuple[Path, list[str]]:
    """Folder to search, and the audio files in it: beside the list, else one folder up (lists in `csv/`)."""
    for folder in [audio] if audio else [path.absolute().parent, path.absolute().parent.parent]:
        found = scan_audio(folder)
        if found:
            return folder, found
    raise InputError(f"{path}: no audio file near it: put the list into the folder that holds the audio")


def _refuse_none_there(path: Path, files: pa.Array, root: Path) -> np.ndarray:
    there = files.is_valid().to_numpy(zero_copy_only=False)
    if not there.any():
        raise InputError(f"{path}: none of its {len(there)} clips is under {root}: files must be named after their id")
    return there


def _mid_labels(path: Path, text: pa.Array) -> tuple[pa.ListArray, list[str]]:
    """`/m/a,/m/b` -> label ids a row; names from `*class_labels_indices.csv`, else the ids of the classes, sorted."""
    mids, offsets = split_names(text, ",")
    known, names = _class_list(path, mids)
    ids = pc.index_in(mids, value_set=known)
    if ids.null_count:
        unknown = mids[int(np.argmax(ids.is_null().to_numpy(zero_copy_only=False)))].as_py()
        raise InputError(f"{path}: class {unknown!r} is not in the class list beside it: use the one that fits")
    return pa.ListArray.from_arrays(offsets, ids.cast(pa.int16())), names


def _class_list(path: Path, mids: pa.Array) -> tuple[pa.Array, list[str]]:
    """Class ids and names in label order."""
    folder = path.absolute().parent
    lists = sorted(folder.glob("*class_labels_indices.csv")) or sorted(folder.parent.glob("*class_labels_indices.csv"))
    if not lists:
        known = pc.array_sort_indices(pc.unique(mids))
        known = pc.unique(mids).take(known)
        return known, known.to_pylist()
    try:
        table = csv.read_csv(lists[0]).sort_by("index")
        return table["mid"].combine_chunks(), table["display_name"].to_pylist()
    except (pa.ArrowException, KeyError) as error:
        raise InputError(f"{lists[0]}: not a class list ({error}): it needs index,mid,display_name") from None
