"""WebDataset tar shards -> manifest: where in which shard each clip lies, and its labels.

A sample is a run of members with one name up to the first dot of the file's name, as the `webdataset` package has it:
`dogs/a.flac`, `dogs/a.json`, `dogs/a.cls` are sample `dogs/a`. Labels come from the json (`labels`, `label`, `classes`,
`class`, `category`, `tags` or `target`: a name, a number, or a list of them), else from the cls (a number or name).
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastsskd.clip_columns import from_columns
from fastsskd.clip_table import SPLIT_NONE, Manifest
from fastsskd.errors import InputError
from fastsskd.layouts.files_present import AUDIO_SUFFIXES

LABEL_FIELDS = ("labels", "label", "classes", "class", "category", "tags", "target")
MAX_META = 1 << 20
"""Bytes of a json or cls member; larger ones are something else."""


@dataclass
class _Clips:
    """Columns of the manifest to be."""

    paths: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[list[str]] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)


def find_shards(folder: Path) -> list[Path]:
    """Tar files at any depth, sorted; hidden ones (half-written shards) are passed over."""
    found = sorted(folder.rglob("*.tar"))
    return [path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts)]


def read_webdataset(shards: list[Path], root: Path, split_names: dict[str, int]) -> Manifest:
    """Manifest of the clips in some shards.

    Args:
        shards: uncompressed tar files below `root`.
        root: folder that the manifest's paths start from.
        split_names: split of the shards in a folder of that name, or whose own name begins with it and a dash.

    Raises:
        InputError: no clip in any.
    """
    clips = _Clips()
    for shard in shards:
        _read_shard(shard, shard.relative_to(root).as_posix(), clips)
    if not clips.keys:
        reason = clips.incomplete[0] if clips.incomplete else f"{shards[0].name} has none"
        raise InputError(f"{root}: no KEY.wav, KEY.flac ... in {len(shards)} tar shard(s); {reason}")
    return from_columns(
        clips.paths,
        root=root,
        keys=_unique(clips.keys, clips.paths),
        **_label_columns(clips.labels),
        splits=_splits(clips.paths, split_names),
        offsets=clips.offsets,
        sizes=clips.sizes,
        source="webdataset",
        absent=clips.incomplete,
    )


def _read_shard(path: Path, name: str, clips: _Clips) -> None:
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in _samples(tar, name, clips.incomplete):
                audio = [m for m in members if os.path.splitext(m.name)[1].lower() in AUDIO_SUFFIXES]
                if not audio:
                    clips.incomplete.append(f"{name}: {key}")
                    continue
                clips.paths.append(name)
                clips.keys.append(key)
                clips.offsets.append(audio[0].offset_data)
                clips.sizes.append(audio[0].size)
                clips.labels.append(_labels(file.fileno(), members))
    except (tarfile.ReadError, OSError) as error:  # one shard of a thousand must not keep the others from being used
        clips.incomplete.append(f"{name} (not an uncompressed tar file, or unreadable: {error})")


def _samples(tar: tarfile.TarFile, name: str, incomplete: list[str]) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Key and members of each sample; a shard that ends too early is noted as incomplete."""
    current, members = "", []
    try:
        for member in tar:
            tar.members = []  # a large shard's list would only grow
            folder, _, file = member.name.rpartition("/")
            key = f"{folder}/{file.partition('.')[0]}".lstrip("/")
            if not member.isfile() or file.startswith("."):
                continue
            if key != current and members:
                yield current, members
                members = []
            current = key
            members.append(member)
    except tarfile.ReadError:
        if not current:  # not even one: no tar file at all
            raise
        incomplete.append(f"{name} (cut short behind {current})")
    if members:
        yield current, members


def _labels(descriptor: int, members: list[tarfile.TarInfo]) -> list[str]:
    """Names of the sample's labels."""
    meta = {m.name.rpartition(".")[2].lower(): m for m in members if m.size <= MAX_META}
    if "json" in meta:
        try:
            about = json.loads(_member(descriptor, meta["json"]))
        except ValueError:  # half of it, or something else under that name
            about = None
        if isinstance(about, dict):
            for name in LABEL_FIELDS:
                if about.get(name) not in (None, "", []):
                    return _names(about[name])
    return _names(_member(descriptor, meta["cls"]).decode("utf-8", "replace").strip()) if "cls" in meta else []


def _member(descriptor: int, member: tarfile.TarInfo) -> bytes:
    return os.pread(descriptor, member.size, member.offset_data)


def _names(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(str(v) for v in values if v not in (None, "")))


def _label_columns(labels: list[list[str]]) -> dict[str, Any]:
    counts = np.fromiter((len(names) for names in labels), np.int32, len(labels))
    names = pa.array([name for names in labels for name in names], pa.string())
    unique = pc.unique(names).to_pylist()
    classes = sorted(unique, key=int) if all(name.isdecimal() for name in unique) else sorted(unique)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    ids = pc.index_in(names, value_set=pa.array(classes, pa.string())).cast(pa.int16())
    lists = pa.ListArray.from_arrays(offsets, ids)
    return {"labels": lists, "classes": classes, "multi_label": bool((counts > 1).any())}


def _unique(keys: list[str], paths: list[str]) -> pa.Array:
    """The samples' keys; where shards repeat them, each with its shard's name before it."""
    array = pa.array(keys, pa.string())
    if pc.count_distinct(array).as_py() == len(array):
        return array
    shard = pc.replace_substring_regex(pa.array(paths, pa.string()), r"\.tar$", "")
    return pc.binary_join_element_wise(shard, array, "/")


def _splits(paths: list[str], split_names: dict[str, int]) -> np.ndarray | None:
    """Split of each clip by its shard's folder or name; None unless every shard tells."""
    code = {}
    for path in dict.fromkeys(paths):
        *folders, file = path.lower().split("/")
        told = [split_names[part] for part in (*folders, file.partition("-")[0]) if part in split_names]
        code[path] = told[-1] if told else SPLIT_NONE
    if SPLIT_NONE in code.values():
        return None
    return np.array([code[path] for path in paths], np.int8)
