"""What ``throughput.py`` found, as numbers, as a page and as a picture."""

import statistics
from pathlib import Path

import common

SOURCES = {
    "flac": "FLAC 16 kHz folder",
    "packed": "Shards",
    "ogg": "Ogg Vorbis 44.1 kHz folder",
}
SHARDS = {"packed": "", "flac shards": ", FLAC shards", "wav shards": ", WAV shards", "wav": ", WAV folder"}
STAGES = (
    ("read_files", "read"),
    ("decode_ours", "+ decode"),
    ("decode_resample", "+ resample"),
    ("ours", "+ features"),
)


def summary(samples: list[dict]) -> dict:
    """Medians of a row's samples."""
    rates = [sample["clips_per_s"] for sample in samples]
    keys = ("clips_per_s", "cpu_s_per_1000", "start_s", "first_batch_s", "pss_mb")
    found = {key: round(statistics.median(sample[key] for sample in samples), 3) for key in keys}
    return found | {"range": [round(min(rates), 3), round(max(rates), 3)], "samples": len(samples)}


class Table:
    """Rows of the results, found by what they are."""

    def __init__(self, results: dict):
        self.rows = results["rows"]

    def find(self, candidate: str, source: str, workers: int = 2) -> dict | None:
        wanted = (candidate, source, workers)
        return next((r for r in self.rows if (r["candidate"], r["source"], r["workers"]) == wanted), None)

    def best(self, candidate: str, source: str) -> dict | None:
        """At its best number of workers."""
        rows = [r for r in self.rows if (r["candidate"], r["source"]) == (candidate, source)]
        return max(rows, key=lambda r: r["clips_per_s"], default=None)

    def group(self, source: str) -> list[dict]:
        """Rows with two workers that belong under a source's title, fastest first, baselines last."""
        members = SHARDS if source == "packed" else (source,)
        rows = [r for r in self.rows if r["source"] in members and r["workers"] == 2]
        return sorted(rows, key=lambda r: (r["kind"] == "baseline", -r["clips_per_s"]))

    def peers(self, source: str) -> list[dict]:
        return [r for r in self.rows if r["source"] == source and r["kind"] == "peer"]


def verdicts(results: dict) -> list[dict]:
    """Each requirement that this run can tell about: what was found, and whether it holds."""
    table, found = Table(results), []

    def ratio(what: str, row: dict | None, to: dict | None, limit: float, times: bool = True) -> None:
        if row and to:
            value = row["clips_per_s"] / to["clips_per_s"]
            found.append((what, value, ">=", limit, "x") if times else (what, 100 * value, ">=", 100 * limit, "%"))

    flac, packed, ogg = (table.find("ours", source) for source in ("flac", "packed", "ogg"))
    ast = table.best("ast", "flac")
    ratio("FLAC folder against AST-style at its best number of workers", flac, ast, 4.0)
    for source, row in (("flac", flac), ("ogg", ogg)):
        rival = max(table.peers(source), key=lambda r: r["clips_per_s"], default=None)
        name = f"{rival['title']}, {rival['workers']} workers" if rival else ""
        ratio(f"{SOURCES[source]} against the fastest peer ({name})", row, rival, 1.0)
    ratio("FLAC folder, of decode-only with DALI's decoder", flac, table.find("decode_dali", "flac"), 0.75, False)
    ratio("FLAC folder, of decode-only with the same decoder", flac, table.find("decode_ours", "flac"), 0.75, False)
    ratio("packed WAV shards against AST-style from FLAC", packed, ast, 12.0)
    ratio("packed WAV shards, of fbank-only", packed, table.find("fbank_only", "memory"), 0.60, False)
    for source, row in (("flac", flac), ("ogg", ogg)):
        thrifty = min((r for r in table.peers(source)), key=lambda r: r["cpu_s_per_1000"], default=None)
        if row and thrifty:
            what = f"{SOURCES[source]}: CPU time against the thriftiest peer ({thrifty['title']})"
            found.append((what, row["cpu_s_per_1000"] / thrifty["cpu_s_per_1000"], "<=", 1.0, "x"))
    cold = results["cold"]
    if cold:
        bound = min(cold["warm"]["clips_per_s"], cold["random"]["clips_per_s"])
        what = "shards not in memory, of the slower of warm shards and the disk's random reads"
        found.append((what, 100 * cold["cold"]["clips_per_s"] / bound, ">=", 80.0, "%"))
    return [common.verdict(*row) for row in found]


def markdown(results: dict) -> str:
    """The results as one page."""
    table, data = Table(results), results["data"]
    lines = [
        "# Throughput",
        "",
        "How many clips a second of ready batches does each loader give on the same files, and what do they cost in "
        "CPU time?",
        "",
        common.machine_line(results["machine"]),
        "",
        f"Clips: {data['origin']}. {data['clips']} clips of 10 s at 16 kHz ({data['distinct']} of them from different "
        f"recordings, the others rotated and softer), {data['flac_bytes'] / 1000:.0f} kB each as FLAC; "
        f"{data['ogg_clips']} Ogg Vorbis files of {data['ogg_seconds']:g} s at 44.1 kHz, looped to 10 s, "
        f"{data['ogg_bytes'] / 1000:.0f} kB each. All in the page cache unless said otherwise.",
        "",
        "Two workers (threads or processes) and batches of 32 unless said otherwise; every sample a fresh process, "
        "candidates in turn, medians over rounds with the range. Ratios are to AST-style at its best number of "
        "workers. CPU time is that of the process and its workers. *Start* is from the start of the process, *first "
        "batch* from the construction of the loader. Memory is PSS of all processes, libraries included. fastsskd "
        "makes HOG as well; the others' batches are fbank only.",
        "",
        *(common.verdict_lines(results["verdicts"]) if results["verdicts"] else []),
        "",
        "![Clips per second of each loader, and against the number of workers](throughput.png)",
    ]
    for source, title in SOURCES.items():
        lines += ["", f"## {title}", "", *source_lines(table, source)]
    lines += ["", "## Features of waveforms in memory", "", *rate_lines(table.group("memory"), None)]
    lines += stage_lines(table) + worker_lines(table) + cold_lines(results) + manifest_lines(results)
    lines += check_lines(results)
    return "\n".join(lines) + "\n"


def source_lines(table: Table, source: str) -> list[str]:
    ast = table.best("ast", "flac" if source == "packed" else source)
    note = {
        "packed": "Ours are what `fastsskd pack` makes, WAV. Ratios are to AST-style on the FLAC folder.",
        "ogg": "Each resamples its own way; see the comparison of outputs below.",
        "flac": "",
    }[source]
    return [*([note, ""] if note else []), *rate_lines(table.group(source), ast)]


def rate_lines(rows: list[dict], ast: dict | None) -> list[str]:
    lines = [
        "| | clips/s | range | to AST-style | CPU s per 1,000 clips | start, s | first batch, s | memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["range"]
        to_ast = f"{r['clips_per_s'] / ast['clips_per_s']:.2f}" if ast and r["kind"] != "baseline" else ""
        title = f"**{r['title']}**" if r["kind"] == "ours" else r["title"] + SHARDS.get(r["source"], "")
        lines.append(
            f"| {title} | {r['clips_per_s']:.0f} | {low:.0f}-{high:.0f} | {to_ast} | {r['cpu_s_per_1000']:.2f} | "
            f"{r['start_s']:.1f} | {r['first_batch_s']:.2f} | {r['pss_mb']:.0f} |"
        )
    return lines


def stage_lines(table: Table) -> list[str]:
    """What each stage adds on the Ogg folder."""
    rows = [(title, table.find(name, "ogg")) for name, title in STAGES]
    if not all(row for _, row in rows):
        return []
    lines = ["", "## What bounds the Ogg folder", "", "| | clips/s | CPU ms per clip | added | share |"]
    lines += ["|---|---|---|---|---|"]
    whole, before = rows[-1][1]["cpu_s_per_1000"], 0.0
    for title, row in rows:
        cpu = row["cpu_s_per_1000"]
        added = cpu - before
        lines.append(f"| {title} | {row['clips_per_s']:.0f} | {cpu:.2f} | {added:.2f} | {100 * added / whole:.0f} % |")
        before = cpu
    return lines


def worker_lines(table: Table) -> list[str]:
    """Clips a second against the number of workers."""
    counts = sorted({r["workers"] for r in table.rows})
    if len(counts) < 2:
        return []
    lines = [
        "",
        "## Number of workers",
        "",
        f"| clips/s | {' | '.join(map(str, counts))} |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for (title, source), line in by_workers(table).items():
        cells = [f"{line[count]:.0f}" if count in line else "" for count in counts]
        lines.append(f"| {title}, {SOURCES[source]} | {' | '.join(cells)} |")
    return lines


def by_workers(table: Table) -> dict[tuple[str, str], dict[int, float]]:
    """(title, source) to number of workers to clips a second, of those that were run with several numbers."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for r in sorted(table.rows, key=lambda r: r["workers"]):
        if r["source"] in SOURCES:
            lines.setdefault((r["title"], r["source"]), {})[r["workers"]] = r["clips_per_s"]
    return {key: line for key, line in lines.items() if len(line) > 1}


def cold_bound(results: dict) -> float:
    """Clips a second of warm shards if each clip cost the CPU time of bringing it from the disk as well.

    Warm shards keep all of few cores busy, so what the system does for the disk can only be added.
    """
    cold, cores = results["cold"], results["machine"]["cores"]
    return 1 / (1 / cold["warm"]["clips_per_s"] + cold["disk_cpu_ms_per_clip"] / 1e3 / cores)


def cold_lines(results: dict) -> list[str]:
    cold = results["cold"]
    if not cold:
        return []
    lines = [
        "",
        "## Shards that are not in memory",
        "",
        f"{cold['gigabytes']:g} GB of WAV shards, {cold['clips']} clips, each read once in random order. Before the "
        f"cold runs {100 * cold['resident_before_cold']:.1f} % of their pages were in the page cache, before the warm "
        f"ones {100 * cold['resident_before_warm']:.1f} %. The disk's own rates are plain reads of the same shards by "
        "two threads. The disk may be a virtual one whose host has a cache of its own. A plain read costs "
        f"{cold['disk_cpu_ms_per_clip']:.2f} ms more of CPU time from the disk than from memory; warm shards keep all "
        f"cores busy, so at best {cold_bound(results):.0f} clips/s are left of theirs, of which cold ones have "
        f"{100 * cold['cold']['clips_per_s'] / cold_bound(results):.0f} %.",
        "",
        "| | clips/s | range | MB/s |",
        "|---|---|---|---|",
    ]
    names = {
        "cold": "fastsskd, cold",
        "warm": "fastsskd, warm",
        "random": "disk, clips in random order",
        "sequential": "disk, shards from front to back",
    }
    for name, title in names.items():
        low, high = cold[name]["range"]
        rate, megabytes = cold[name]["clips_per_s"], cold[name]["megabytes_per_s"]
        lines.append(f"| {title} | {rate:.0f} | {low:.0f}-{high:.0f} | {megabytes:.0f} |")
    return lines


def manifest_lines(results: dict) -> list[str]:
    found = results["large_manifest"]
    if not found:
        return []
    lines = [
        "",
        "## A manifest of many rows",
        "",
        f"{found['rows']:,} rows, a file of {found['file_mb']:g} MB that is mapped, so that all processes of a machine "
        "share the part marked *file* (which is mostly libraries).",
        "",
        "| | start, s | first batch, s | clips/s | RSS, MB | file, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in (("small", results["data"]["clips"]), ("large", found["rows"])):
        r = found[name]
        lines.append(
            f"| {rows:,} rows | {r['start_s']:.1f} | {r['first_batch_s']:.2f} | {r['clips_per_s']:.0f} | "
            f"{r['rss_mb']:.0f} | {r['file_mb']:.0f} |"
        )
    return lines


def check_lines(results: dict) -> list[str]:
    lines = [
        "",
        "## Outputs compared before timing",
        "",
        "Differences of the un-normalised log-mel to torchaudio's Kaldi fbank of the same clips, decoded by "
        "libsndfile. At 16 kHz all have the same samples: at most 0.02, 0.0001 on average; torchaudio itself is up to "
        "0.0055 off the formula in float64, in the quietest bins. From 44.1 kHz (reference: SciPy's polyphase "
        "resampler) everyone's low-pass ends elsewhere and bins of near silence differ freely: at most 0.1 on average. "
        "DALI's own features are reported, not asserted. HOG: ours against the torch reference.",
        "",
        "| | largest | mean | HOG |",
        "|---|---|---|---|",
    ]
    for name, found in results["checks"].items():
        if isinstance(found, dict):
            hog = f"{found['hog']:.2g}" if found["hog"] is not None else ""
            mean = f"{found['mean']:.2g}" if found["mean"] is not None else ""
            lines.append(f"| {name} | {found['largest']:.2g} | {mean} | {hog} |")
    if results["failures"]:
        lines += ["", "## Not measured", ""]
        lines += [f"- {name}: {reason}" for name, reason in results["failures"].items()]
    return lines


def plot(results: dict, path: Path) -> None:
    """Bars a source, and lines against the number of workers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = Table(results)
    figure, axes = plt.subplots(2, 2, figsize=(15, 10), layout="constrained")
    for axis, (source, title) in zip(axes.flat, SOURCES.items(), strict=False):
        rows = table.group(source) + (table.group("memory") if source == "packed" else [])
        bars(axis, [r for r in rows if not r["candidate"].startswith("read_")], title)
    worker_plot(axes[1, 1], by_workers(table))
    figure.suptitle("Ready batches from files in memory, clips per second (grey: one stage alone)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


COLOURS = {"ours": "tab:red", "peer": "tab:blue", "baseline": "lightgrey"}


def bars(axis, rows: list[dict], title: str) -> None:
    rows = rows[::-1]
    names = [r["title"] + SHARDS.get(r["source"], "") for r in rows]
    rates = [r["clips_per_s"] for r in rows]
    errors = [[max(0, rate - r["range"][0]) for rate, r in zip(rates, rows, strict=True)]]
    errors.append([max(0, r["range"][1] - rate) for rate, r in zip(rates, rows, strict=True)])
    drawn = axis.barh(names, rates, xerr=errors, color=[COLOURS[r["kind"]] for r in rows], ecolor="0.4")
    axis.bar_label(drawn, [f" {rate:.0f}" for rate in rates], padding=4, fontsize=8)
    axis.margins(x=0.12)
    axis.set(title=title, xlabel="clips/s")


def worker_plot(axis, lines: dict[tuple[str, str], dict[int, float]]) -> None:
    """A colour for each loader, a line style for each source."""
    if not lines:
        axis.set_axis_off()
        return
    titles = list(dict.fromkeys(title for title, _ in lines))
    others = iter(("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:olive", "tab:cyan"))
    colours = {title: COLOURS["ours"] if title == "fastsskd" else next(others) for title in titles}
    for (title, source), line in lines.items():
        style, marker = {"flac": ("-", "o"), "packed": ("-.", "s"), "ogg": (":", "^")}[source]
        name = f"{title}, {SOURCES[source].split()[0]}"
        axis.plot(list(line), list(line.values()), style, marker=marker, color=colours[title], label=name)
    axis.set(title="Number of workers", xlabel="workers", ylabel="clips/s", yscale="log")
    axis.set_xticks(sorted({count for line in lines.values() for count in line}))
    axis.grid(axis="y", which="both", alpha=0.3)
    axis.legend(fontsize=8, loc="center right", bbox_to_anchor=(-0.17, 0.5))
