"""What does `fastsskd profile` say of usual situations, and does its advice gain what it predicts?

    python benchmarks/scenarios.py            # six situations, two profiles of each: 15 minutes
    python benchmarks/scenarios.py --smoke    # does it still run: nothing to quote

Each situation is a configuration that people have, on the same generated sounds as 44.1 kHz Ogg files of 10 s or as
packed shards; what holds it up is known from how it was made. `fastsskd profile --try` must name it, and the gain that
it predicts for its best advice stands beside the gain of really following it. Bottlenecks that no configuration makes
(a slow disk, a slow rank, a slow network) are planted in tests/test_profile.py.

Results go to ``benchmarks/results/scenarios.{json,md}``.

Last result, 2026-11-23: 12 of 12 profiles name what is known; predicted gains of 3.0, 5.6 and 11.3 x, measured 3.1, 5.6
and 13.2 x.
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import common
import numpy as np
import soundfile
from step_models import save_ast

from fastsskd.sound_synthesis import CLASSES

RESULTS, LAUNCH = Path(__file__).parent / "results", common.LAUNCH
RATE, SECONDS = 44_100, 10.0
CLIPS = 96
BATCH = 16


@dataclass(frozen=True)
class Situation:
    """A training, and what is known to hold it up.

    Attributes:
        name: in words. fields: of the configuration. stage: that is profiled.
        word: of the verdict. advice: the best one's key, or one of several that are equally right.
        packed: whether the clips are packed. taught: whether there is a teacher in the step.
    """

    name: str
    word: str
    advice: tuple[str, ...]
    fields: tuple[str, ...] = ()
    stage: str = "distill"
    packed: bool = False
    taught: bool = False


SHORT = ("data.seconds=1",)
SITUATIONS = (
    Situation("Multi-SSL of the nano model, packed clips", "COMPUTE-BOUND", ("model",), stage="ssl", packed=True),
    Situation(
        "an oversized model: labels, tiny, packed clips", "COMPUTE-BOUND", ("model",), ("model.size=tiny",), packed=True
    ),
    Situation("1 s crops of 44.1 kHz Ogg recordings", "LOADER-BOUND", ("pack",), SHORT),
    Situation("the same, one loader thread", "LOADER-BOUND", ("pack", "threads"), (*SHORT, "data.workers=1")),
    Situation("the same, packed", "COMPUTE-BOUND", ("model", "optimizer"), SHORT, packed=True),
    Situation("a larger teacher in the step", "COMPUTE-BOUND", ("teacher",), packed=True, taught=True),
)


def make_clips(folder: Path, count: int) -> dict[bool, Path]:
    """Recordings and the same packed: manifests by whether they are."""
    names = list(CLASSES)
    for number in range(count):
        name = names[number % len(names)]
        random = np.random.default_rng([29, number])
        clip = CLASSES[name](random, round(SECONDS * RATE), RATE)
        clip = 0.5 * clip / max(np.abs(clip).max(), 1e-9) + 0.02 * random.standard_normal(len(clip))
        (folder / "ogg" / name).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / "ogg" / name / f"{number:03d}.ogg", clip, RATE, format="OGG", subtype="VORBIS")
    manifest = folder / "ogg.manifest"
    common.fastsskd("index", folder / "ogg", "--out", manifest)
    common.fastsskd("pack", manifest, "--out", folder / "packed")
    return {False: manifest, True: folder / "packed" / "packed.manifest"}


def profile(situation: Situation, manifest: Path, fields: list[str], folder: Path, seconds: float) -> dict:
    """`fastsskd profile --try --json` of the situation, in a fresh process."""
    command = [sys.executable, "-m", "fastsskd.cli", "profile", "--try", "--json", "--stage", situation.stage]
    command += [
        "--config",
        str(LAUNCH / "configs" / "quickstart.toml"),
        "--ds_config",
        str(common.batch_file(folder, BATCH)),
    ]
    command += ["--manifest", str(manifest), "--seconds", str(seconds)]
    command += [word for field in fields for word in ("--set", field)]
    return common.answer(situation.name, command, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})


def row_of(situation: Situation, samples: list[dict]) -> dict:
    """What the samples say together; gains are those of the first one's best advice."""
    found = [(sample["verdict"], sample["advice"][0]["key"] if sample["advice"] else "none") for sample in samples]
    same = [one for sample in samples for one in sample["advice"] if one["key"] == found[0][1]]
    gains = {
        "predicted": [one["gain"] for one in same if one["gain"] is not None],
        "measured": [one["tried"]["value"] for one in same if one["tried"] is not None],
    }
    rates = [sample["clips_per_second"]["end_to_end"]["value"] for sample in samples]
    return {
        "name": situation.name,
        "found": found,
        "right": [word == situation.word and advice in situation.advice for word, advice in found],
        "samples": rates,
        "end_to_end": statistics.median(rates),
        **{name: statistics.median(values) if values else None for name, values in gains.items()},
        "seconds": statistics.median(sample["seconds"] + sample["setup"] for sample in samples),
    }


def measure(options: argparse.Namespace, folder: Path) -> list[dict]:
    manifests = make_clips(folder, options.clips)
    ast = save_ast(folder, *options.teacher)
    taught = [f"distill.teacher={ast['path']}", f"distill.teacher_classes={ast['classes']}"]
    samples: dict[Situation, list[dict]] = {situation: [] for situation in options.situations}
    for _ in range(options.rounds):
        for situation in options.situations:
            options.watch.wait()
            # Labels alone unless the situation has a teacher: the configuration's own is trained first.
            fields = [*(taught if situation.taught else ["distill.teacher="]), *situation.fields, *options.set]
            found = profile(situation, manifests[situation.packed], fields, folder, options.seconds)
            print(f"{situation.name}: {found['line']}", file=sys.stderr, flush=True)
            samples[situation].append(found)
    return [row_of(situation, found) for situation, found in samples.items()]


def write(rows: list[dict], about: dict, out: Path) -> None:
    right = [one for row in rows for one in row["right"]]
    named = 100 * sum(right) / len(right)
    verdicts = [common.verdict(f"of {len(right)} profiles, those that name what is known", named, ">=", 100, "%")]
    lines = ["# What the profiler says", "", common.machine_line(about), "", *common.verdict_lines(verdicts), ""]
    lines += [
        f"Generated sounds of {SECONDS:g} s, batches of {BATCH}. Gains: of the best advice, on the clips a second end "
        "to end, as predicted and as measured by following it.",
        "",
        "| situation | clips/s | verdict | best advice | predicted | measured |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        words, advice = (" / ".join(dict.fromkeys(said)) for said in zip(*row["found"], strict=True))
        gains = " | ".join("-" if row[key] is None else f"x {row[key]:.2f}" for key in ("predicted", "measured"))
        lines.append(f"| {row['name']} | {row['end_to_end']:.4g} | {words} | {advice} | {gains} |")
    lines += ["", f"A profile with its trials took {statistics.median(row['seconds'] for row in rows):.0f} s."]
    common.write(out, "scenarios", {"machine": about, "rows": rows, "verdicts": verdicts}, "\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of one profile, and of its trials (default %(default)g)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="change one field of every situation"
    )
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait in all for an idle machine")
    parser.add_argument("--smoke", action="store_true", help="two situations, briefly: only to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.situations, options.clips, options.teacher = SITUATIONS, CLIPS, (2, 192)
    if options.smoke:
        options.rounds, options.seconds, options.patience, options.clips, options.teacher = 1, 2.0, 0.0, 48, (1, 64)
        options.situations = (SITUATIONS[3], SITUATIONS[-1])
    options.watch = common.IdleWatch(options.patience)
    command = "python benchmarks/" + " ".join([Path(__file__).name, *sys.argv[1:]])
    about = common.machine({name: version(name) for name in ("torch", "deepspeed")}, command)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    write(rows, about | {"samples_on_an_idle_machine": str(options.watch)}, options.out)


if __name__ == "__main__":
    main()
