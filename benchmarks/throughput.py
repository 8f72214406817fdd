"""How many clips a second of ready batches does each loader give on the same files, and what do they cost in CPU time?

    python benchmarks/throughput.py --peers_python PEERS/bin/python    # everything, one and a half hours
    python benchmarks/throughput.py --smoke                           # does it still run: minutes, nothing to quote
    python -m venv PEERS && PEERS/bin/pip install -r benchmarks/peers.txt     # the others' loaders; some need FFmpeg

A batch is 32 clips' Kaldi fbank of 10 s, 128 bins, padded to 1024 frames and normalised; ours makes HOG as well, so the
others do less. Each loader reads the same files from the page cache with two workers, as its own users run it. Every
sample is a fresh process: start-up is timed apart, then batches are counted for some seconds, with the CPU time of the
process and all its workers. Candidates take turns, round after round, so that a busy machine slows all of them; cells
are medians. Before anything is timed, outputs are compared with torchaudio's fbank of the same clips.

How to read it: the baselines (only read, only decode, only features) say what a loader could reach at best with those
parts; ratios travel from machine to machine better than clips a second do. Results go to
``benchmarks/results/throughput.json``, ``.md`` and ``.png``.

Last result, 2026-11-23: against an AST-style Dataset on FLAC 4.3 x from FLAC and 13.4 x from packed shards; 1.5 x the
fastest peer on 44.1 kHz Ogg; 62 % of its own decoder alone on FLAC.
"""

# ruff: noqa: E402
import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # in the samples too: workers must not fight over the cores

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import common
import nvidia.dali
import throughput_big
import throughput_data
import throughput_report

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ESC10 = HERE.parents[1] / "shared/data/esc10"
BATCH = 32
WORKERS, OTHER_WORKERS = 2, (1, 3, 4)
TIMEOUT_S = 300

EXACT_LARGEST, EXACT_MEAN, EXACT_HOG = 0.02, 1e-4, 1e-3
"""Same samples in: log-mel may differ by rounding only. In the quietest bins that is much: torchaudio itself is up to
0.0055 off the same formula in float64 on these clips, and so are we."""
RESAMPLED_MEAN = 0.1
"""Resampled: everyone's low-pass ends elsewhere, and the bins above and those of silence differ freely."""


class Candidate(NamedTuple):
    """A loader or a baseline: the module and function that it is, its name in tables, what it is run on."""

    home: str
    name: str
    title: str
    sources: tuple[str, ...]
    kind: str = "peer"


BOTH, TARS = ("flac", "ogg"), ("flac shards", "wav shards")
CANDIDATES = (
    Candidate("ours", "ours", "fastsskd", ("flac", "packed", "ogg"), "ours"),
    Candidate("peers", "ast", "AST-style Dataset", ("flac", "ogg", "wav")),
    Candidate("peers", "webdataset", "webdataset", TARS),
    Candidate("peers", "webdataset_soundfile", "webdataset, decoded by soundfile", TARS),
    Candidate("peers", "lhotse", "lhotse", BOTH),
    Candidate("peers", "huggingface", "Hugging Face datasets", BOTH),
    Candidate("peers", "spdl", "spdl", BOTH),
    Candidate("peers", "torchcodec", "torchcodec in AST-style Dataset", BOTH),
    Candidate("ours", "dali", "DALI's own features (not Kaldi's)", BOTH),
    Candidate("peers", "threads", "best effort: soundfile, torch, threads", BOTH),
    Candidate("ours", "read_files", "only read", ("ogg",), "baseline"),
    Candidate("ours", "read_shards", "only read", ("packed",), "baseline"),
    Candidate("ours", "decode_ours", "only read and decode, ours", BOTH, "baseline"),
    Candidate("ours", "decode_dali", "only decode, bare DALI pipeline", BOTH, "baseline"),
    Candidate("ours", "decode_soundfile", "only decode, soundfile in threads", BOTH, "baseline"),
    Candidate("ours", "decode_resample", "only decode and resample, ours", ("ogg",), "baseline"),
    Candidate("ours", "fbank_only", "only fbank, ours", ("memory",), "baseline"),
    Candidate("ours", "features_only", "only fbank and HOG, ours", ("memory",), "baseline"),
)


class Row(NamedTuple):
    """A candidate on a source with a number of workers."""

    candidate: Candidate
    source: str
    workers: int


class Bench:
    """Starts samples on an idle machine and keeps what they found."""

    def __init__(self, options: argparse.Namespace, data: dict):
        self.options, self.data = options, data
        self.idle = common.IdleWatch(options.patience)
        self.failures: dict[Row, str] = {}
        self.samples: dict[Row, list[dict]] = {}

    def sample(self, row: Row, source: dict | None = None, **changes) -> dict:
        """One process; ``{"failed": reason}`` where it could not be."""
        options = self.options
        job = {
            "home": row.candidate.home,
            "name": row.candidate.name,
            "source": source or self.data["sources"][row.source],
            "workers": row.workers,
            "batch": BATCH,
            "reference": None,
            "kind": "ogg" if row.source == "ogg" else "clips",
            "window_s": options.window,
            "warm_s": options.window / 4,
            "most_clips": 0,
        }
        python = options.peers_python if row.candidate.home == "peers" else sys.executable
        self.idle.wait()
        job |= {"started": time.monotonic()} | changes
        command = [python, str(HERE / "throughput_sample.py")]
        try:
            done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {"failed": f"no result in {TIMEOUT_S} s"}
        if done.returncode:
            return {"failed": scrubbed(reason(done.stderr))}
        return json.loads(done.stdout.splitlines()[-1])

    def check(self, rows: list[Row]) -> dict:
        """Compare everyone's output; a peer that is not there or gives something else is left out, ours may not be."""
        found = {}
        absent = {}
        for row in rows:
            if row.candidate in absent:
                self.failures[row] = found[label(row)] = absent[row.candidate]
                continue
            reference = None if row.candidate.kind == "baseline" else self.data["reference"]
            result = self.sample(row, reference=reference, window_s=self.options.window if self.options.smoke else 0)
            why = result.get("failed") or wrong(row, result.get("check"))
            if why:
                if row.candidate.kind != "peer":
                    raise SystemExit(f"{row.candidate.title} on {row.source}: {why}")
                self.failures[row] = why
                if why.endswith("is not installed"):
                    absent[row.candidate] = why
            elif self.options.smoke:
                self.samples[row] = [result]
            found[label(row)] = result.get("check") or why or "baseline: no features"
            say(f"checked {label(row)}: {found[label(row)]}")
        return found

    def time(self, rows: list[Row], rounds: int) -> None:
        """Each row once a round."""
        rows = [row for row in rows if row not in self.failures]
        began = time.monotonic()
        for number in range(rounds * len(rows)):
            row = rows[number % len(rows)]
            result = self.sample(row)
            if "failed" in result:
                self.failures[row] = result["failed"]
            else:
                self.samples.setdefault(row, []).append(result)
            left = (time.monotonic() - began) / (number + 1) * (rounds * len(rows) - number - 1) / 60
            say(f"{number + 1} of {rounds * len(rows)}, {left:.0f} min left: {label(row)} {brief(result)}")

    def table(self) -> list[dict]:
        """One entry a row: medians, and the range of clips a second."""
        return [
            {
                "candidate": row.candidate.name,
                "title": row.candidate.title,
                "kind": row.candidate.kind,
                "source": row.source,
                "workers": row.workers,
                **throughput_report.summary(samples),
            }
            for row, samples in self.samples.items()
        ]


def wrong(row: Row, found: dict | None) -> str | None:
    """What is wrong with a candidate's output, if anything."""
    if found is None or row.candidate.name == "dali":  # DALI's differ by design: reported, not asserted
        return None
    if not found["compared"]:
        return "none of the clips to compare came by"
    if row.source == "ogg":
        return f"mean difference {found['mean']:.2g}" if found["mean"] > RESAMPLED_MEAN else None
    if found["largest"] > EXACT_LARGEST or found["mean"] > EXACT_MEAN or (found["hog"] or 0) > EXACT_HOG:
        return f"off by {found['largest']:.2g}, {found['mean']:.2g} on average, HOG by {found['hog']}"
    return None


def label(row: Row) -> str:
    return f"{row.candidate.name} on {row.source}, {row.workers} workers"


def brief(result: dict) -> str:
    return result.get("failed") or f"{result['clips_per_s']:.0f} clips/s"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def reason(text: str) -> str:
    """What a failed process had to say, in one line: its first error, which is what the others came from."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exit|Exception): ", line)]
    missing = re.match(r"ModuleNotFoundError: No module named '([\w.]+)'", "".join(errors[:1]))
    if missing:
        return f"{missing[1]} is not installed"
    return (errors or lines[-1:] or ["failed without a word"])[0][:200]


def scrubbed(text: str) -> str:
    """Without this machine's paths."""
    return re.sub(r"(/[\w.+-]+){2,}", "PATH", text)


def more_workers(bench: Bench) -> list[Row]:
    """Other numbers of workers, for us, for AST-style and for the two fastest peers of each folder."""
    rows = []
    for source in ("flac", "ogg", "packed"):
        timed = [row for row in bench.samples if row.source == source and row.candidate.kind == "peer"]
        timed.sort(key=lambda row: -statistics.median(s["clips_per_s"] for s in bench.samples[row]))
        chosen = [row for row in bench.samples if row.source == source and row.candidate.name in ("ours", "ast")]
        chosen += [row for row in timed[:2] if row not in chosen]
        rows += [row._replace(workers=workers) for row in chosen for workers in OTHER_WORKERS]
    return rows


def versions(peers_python: str) -> dict[str, str]:
    """Of what was measured; the peers' from their own environment."""
    names = ("torchcodec", "webdataset", "lhotse", "datasets", "spdl", "soundfile", "soxr")
    program = (
        "import sys, importlib.metadata as m\n"
        "for n in sys.argv[1:]:\n"
        "    try: print(n, m.version(n))\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    found = {name: version(name) for name in ("torch", "torchaudio", "numba", "numpy")}
    found["dali"] = nvidia.dali.__version__
    done = subprocess.run([peers_python, "-c", program, *names], capture_output=True, text=True, check=True)
    found |= dict(line.split() for line in done.stdout.splitlines())
    try:
        line = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True).stdout
        found["ffmpeg"] = line.split()[2].split("-")[0]
    except (OSError, IndexError):
        found["ffmpeg"] = "none"
    return found


def command(options: argparse.Namespace) -> str:
    """The command line without this machine's folders."""
    parts = [
        f"--clips {options.clips} --rounds {options.rounds} --window {options.window:g} --big_gb {options.big_gb:g}"
    ]
    parts += ["--audio DIR"] if options.audio else []
    parts += ["--peers_python PEERS/bin/python"] if options.peers_python != sys.executable else []
    parts += ["--smoke"] if options.smoke else []
    parts += [f"--only {' '.join(options.only)}"] if options.only else []
    return " ".join(["python benchmarks/throughput.py", *parts])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("FASTSSKD_AUDIO") or (ESC10 if ESC10.is_dir() else None)
    parser.add_argument("--audio", type=Path, default=default, help="44.1 kHz clips, any layout; default: ESC-10")
    parser.add_argument("--generate", action="store_true", help="generated clips, even where there are real ones")
    parser.add_argument("--clips", type=int, default=512, help="16 kHz clips to make")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=8.0, help="seconds that batches are counted")
    parser.add_argument("--big_gb", type=float, default=8.0, help="shards for the cold start; 0 = leave it out")
    parser.add_argument("--rows", type=int, default=2_000_000, help="clips of the large manifest; 0 = leave it out")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(c.name for c in CANDIDATES)}")
    parser.add_argument("--peers_python", default=sys.executable, help="interpreter that has what peers.txt lists")
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait, in all, for an idle machine")
    parser.add_argument("--work", type=Path, help="folder on a disk for temporary files (12 GB); default: the system's")
    parser.add_argument("--smoke", action="store_true", help="each once and briefly, the others on one source")
    parser.add_argument("--out", type=Path, help=f"folder for throughput.json, .md and .png; default: {RESULTS.name}/")
    options = parser.parse_args()
    options.audio = None if options.generate else options.audio
    options.out = options.out or (None if options.smoke else RESULTS)
    if options.smoke:
        options.rounds, options.window, options.patience = 1, min(options.window, 0.5), 0
        options.clips = min(options.clips, 64)
        options.big_gb, options.rows = min(options.big_gb, 0.02), min(options.rows, 20_000)
    return options


def measure(options: argparse.Namespace, folder: Path) -> dict:
    """All of it; what there is is written after each part, so that a run that is stopped is not lost."""
    data = throughput_data.build(folder, options.audio, options.clips)
    bench = Bench(options, data)
    chosen = [c for c in CANDIDATES if not options.only or c.name in options.only]
    rows = [Row(candidate, source, WORKERS) for candidate in chosen for source in candidate.sources]
    if options.smoke:
        rows = [row for row in rows if row.candidate.kind == "ours" or row.source == row.candidate.sources[0]]
    results = {"machine": common.machine(versions(options.peers_python), command(options)), "data": data["about"]}
    results |= {"checks": bench.check(rows), "cold": None, "large_manifest": None}
    ours = Row(CANDIDATES[0], "packed", WORKERS)
    if not options.smoke:
        bench.time(rows, options.rounds)
        write(options, results, bench)
    if options.big_gb:
        results["cold"] = throughput_big.cold(bench, ours, folder / "big")
    if options.rows:
        results["large_manifest"] = throughput_big.large_manifest(bench, ours)
    if not options.smoke:
        write(options, results, bench)
        bench.time(more_workers(bench), min(options.rounds, 3))
    write(options, results, bench)
    return results


def write(options: argparse.Namespace, results: dict, bench: Bench) -> None:
    """The samples so far as numbers, a page and a picture."""
    results["rows"] = bench.table()
    results["failures"] = {label(row): reason for row, reason in bench.failures.items()}
    results["machine"]["samples_on_an_idle_machine"] = str(bench.idle)
    results["verdicts"] = throughput_report.verdicts(results)
    if options.out:
        common.write(options.out, "throughput", results, throughput_report.markdown(results))
        throughput_report.plot(results, options.out / "throughput.png")


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="throughput-", dir=options.work) as folder:
        results = measure(options, Path(folder))
    print(throughput_report.markdown(results))


if __name__ == "__main__":
    main()
