"""What a clip costs a node's cores and disks, by the kind of file it is in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastsskd.clip_table import PACKED
from fastsskd.errors import InputError
from fastsskd.manifest import Manifest

SOURCES = {"packed": "packed shards or WAV", "flac": "FLAC 16 kHz", "ogg": "Ogg Vorbis 44.1 kHz"}
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "throughput.json"
_SAMPLED = 200  # files of a manifest whose sizes are looked at


@dataclass(frozen=True)
class LoaderCost:
    """Of one clip.

    Attributes:
        source: a key of :data:`SOURCES`.
        seconds: a core needs to read and decode it, for a GPU; without one also to compute its features.
        bytes: read from the disk.
        origin: where the figures are from.
    """

    source: str
    seconds: float
    bytes: float
    origin: str


# CPU ms of a 10 s clip until its features are there, and until it is decoded; kB. Results of benchmarks/throughput.py
# go before.
_BUILT_IN = {"packed": (0.86, 0.26, 320.0), "flac": (2.08, 1.2, 193.0), "ogg": (9.42, 6.34, 103.0)}
_ORIGIN = "benchmarks/throughput.py on two cores of an AMD EPYC"
_FEATURES = 0.6e-3  # seconds of a core for fbank and HOG of 10 s, benchmarks/results/kernels.md
_LEAST = 0.05e-3  # seconds of a core for anything at all


def costs(on_gpu: bool, seconds: float, results: Path = RESULTS) -> dict[str, LoaderCost]:
    """Cost of each source, as ``benchmarks/throughput.py`` measured it, or as it was when this was written.

    Args:
        on_gpu: the features are made there.
        seconds: of a crop. A crop of packed clips costs its own length, other files are decoded whole.

    Raises:
        InputError: the file of results is not one.
    """
    found = {name: (ms * 1e-3, decoded * 1e-3, kb * 1e3, _ORIGIN) for name, (ms, decoded, kb) in _BUILT_IN.items()}
    if results.is_file():
        found |= _from_results(results)
    length, made = seconds / 10.0, {}
    for name, (whole, decoded, read, origin) in found.items():
        share = length if name == "packed" else 1.0
        features = 0.0 if on_gpu else (whole - decoded) * length
        made[name] = LoaderCost(name, decoded * share + features, read * share, origin)
    return made


def _from_results(results: Path) -> dict[str, tuple[float, float, float, str]]:
    """What was measured; a run of the benchmark may have left out some of the sources."""
    try:
        measured = json.loads(results.read_text(encoding="utf-8"))
        about, machine = measured["data"], measured["machine"]
        sizes = {"packed": 320e3, "flac": float(about["flac_bytes"]), "ogg": float(about["ogg_bytes"])}
        origin = f"benchmarks/results/throughput.json ({machine['cpu']}, {machine['date']})"
        rows = {
            (r["candidate"], r["source"]): float(r["cpu_s_per_1000"]) * 1e-3
            for r in measured["rows"]
            if r["workers"] == 2
        }
        found = {}
        for name in SOURCES:
            if whole := rows.get(("ours", name)):
                decoded = rows.get(("decode_ours", name), whole - _FEATURES)  # shards have nothing to decode
                found[name] = (whole, min(max(decoded, _LEAST), whole), sizes[name], origin)
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{results}: not a result of benchmarks/throughput.py ({error!r}); remove it") from None


def cost_of(clips: Manifest, known: Mapping[str, LoaderCost]) -> LoaderCost:
    """Cost of a manifest's clips: that of its kind of file, with the bytes that its files have."""
    if clips.source == PACKED:
        return known["packed"]
    chosen = range(0, len(clips), max(len(clips) // _SAMPLED, 1))
    files = [Path(clips.path(i)) for i in chosen]
    kinds = [file.suffix.lower() for file in files]
    common = max(set(kinds), key=kinds.count)
    kind = {".wav": "packed", ".flac": "flac"}.get(common, "ogg")  # what else there is costs about as much as Ogg
    sizes = [file.stat().st_size for file in files if file.is_file()]
    read = known[kind].bytes if kind == "packed" or not sizes else sum(sizes) / len(sizes)
    return LoaderCost(kind, known[kind].seconds, read, known[kind].origin)
