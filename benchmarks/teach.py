"""What do a teacher's stored answers take on the disk, and how much faster is a step without the teacher in it?

    python benchmarks/teach.py                      # a small student under an AST, batch 8; on a GPU where there is one
    python benchmarks/teach.py --student base --batch 64 --rounds 20

The teacher has AST's size (86 M parameters, 1212 patches of a 10 s clip, 527 classes) and random weights, on which
neither bytes nor seconds depend. `fastsskd teach` stores its answers to some clips; then one batch goes through the
student's step, through DeepSpeed in 16 bits: with labels only, with the stored answers, with the teacher in the step.
Rows are timed in turn, round after round; a cell is the median. Before that, the losses of the two with a teacher are
held against each other. Results go to ``benchmarks/results/teach.{json,md}``.

Last result, 2026-11-22: 1.6 GB per million clips and crop; on two CPU cores a step without the teacher is 3.8 x as
fast.
"""

import argparse
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import common
import numpy as np
import pyarrow as pa
import soundfile
import torch
from step_models import CLASSES, SECONDS, save_ast, student
from step_timing import DEVICE, GPU, one_step, seconds_of
from train_step import Setting

from fastsskd import distributed
from fastsskd.answers import scores as stored_scores
from fastsskd.answers.stored import StoredAnswers
from fastsskd.answers.teach import Options, teach
from fastsskd.batch import Batch
from fastsskd.clip_columns import from_columns
from fastsskd.loader import Loader
from fastsskd.manifest import Manifest
from fastsskd.teachers import Teacher, load_teacher

RESULTS = Path(__file__).parent / "results"


def save_clips(folder: Path, number: int) -> Manifest:
    """Clips of noise, a little longer than a crop, of two classes each."""
    random = np.random.default_rng(0)
    for i in range(number):
        noise = random.standard_normal(round(1.1 * SECONDS * 16_000)) * random.uniform(0.01, 0.2)
        soundfile.write(folder / f"{i}.wav", noise, 16_000, subtype="PCM_16")
    labels = pa.array([sorted(random.choice(527, 2, replace=False).tolist()) for _ in range(number)])
    names = [f"{i}.wav" for i in range(number)]
    return from_columns(names, root=folder, labels=labels.cast(pa.list_(pa.int16())), classes=CLASSES, multi_label=True)


def first_batch(clips: Manifest, answers: StoredAnswers, size: int) -> Batch:
    """With the waveforms for the teacher and the stored answers of the same crops."""
    options = {"seconds": SECONDS, "train": True, "waveform": True, "crops": answers, "device": DEVICE}
    loader = Loader(clips, batch_size=size, **options)
    batch = next(iter(loader))
    loader.close()
    return batch


def compare(batch: Batch, kinds: dict[str, Teacher | StoredAnswers | None]) -> dict[str, float]:
    """The distillation terms with the teacher and with what was stored of it, in float32."""
    terms = {}
    for name in ("teacher in the step", "stored answers"):
        with torch.no_grad():
            _, terms[name] = student("nano", kinds[name]).to(DEVICE)(batch)
    online, stored = terms.values()
    found = {name: abs(online[name] - stored[name]).item() for name in ("teacher_label", "regression")}
    assert max(found.values()) < 5e-3, found
    return found


def measure(args: argparse.Namespace, folder: Path) -> dict:
    watch = common.IdleWatch(args.patience)
    named, clips = save_ast(folder, *args.teacher), save_clips(folder, args.batch)
    options = Options((named["path"],), seconds=SECONDS, teacher_classes=named["classes"], precision=args.precision)
    about = common.machine({name: version(name) for name in ("torch", "deepspeed", "timm")}, args.command)
    watch.wait()
    taught = teach(clips, folder / "answers", options, source="clips", device=DEVICE.type, batch_size=args.batch)
    answers = StoredAnswers(folder / "answers", clips, SECONDS)
    batch = first_batch(clips, answers, args.batch)
    teacher = load_teacher(named["path"], classes=named["classes"]).to(DEVICE)
    kinds = {"labels only": None, "stored answers": answers, "teacher in the step": teacher}
    error, setting = compare(batch, kinds), Setting(args)
    engines = {name: setting.engine(student(args.student, kind)) for name, kind in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(args.rounds + 1):
        for name, engine in engines.items():
            watch.wait()
            passed = seconds_of(lambda engine=engine: one_step(engine, batch))
            if number:  # the first one allocates
                seconds[name].append(passed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "machine": about | {"samples_on_an_idle_machine": str(watch), "device": device_name()},
        "student": args.student,
        "teacher": f"{sum(p.numel() for p in teacher.parameters()) / 1e6:.0f} M parameters and 1212 patches",
        "batch": args.batch,
        "precision": args.precision,
        "embed_dim": answers.embed_dim,
        "bytes_per_million_clips": disk(answers.embed_dim),
        "command_bytes_per_million_clips": taught["bytes_per_million_clips"],
        "read_microseconds_per_clip": read_time(answers, args.batch),
        "loss_error": error,
        "seconds": seconds,
        "median_s": medians,
        "speed_up": medians["teacher in the step"] / medians["stored answers"],
    }


def disk(embed_dim: int) -> dict[str, int]:
    """Bytes of the arrays for a million clips and one crop of each, by what is kept of the scores."""
    kept = {"features only": 0, "top 10": 10, "top 20": 20, "top 50": 50, "all 527": 527}
    return {
        name: 1_000_000
        * (2 * embed_dim + 1 + 2 * (top_k > 0) * stored_scores.width(top_k, 527) + 2 * top_k * (top_k < 527))
        for name, top_k in kept.items()
    }


def read_time(answers: StoredAnswers, batch: int) -> float:
    """Microseconds that a loader's worker needs for a clip's answers, files in memory."""
    index, times = np.arange(batch), []
    for _ in range(50):
        begin = time.perf_counter()
        answers.answers(0, index)
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times) / batch


def device_name() -> str:
    return torch.cuda.get_device_name() if GPU else "CPU"


def write(result: dict, out: Path) -> None:
    about, medians = result["machine"], result["median_s"]
    lines = ["# Stored answers", "", common.machine_line(about), "", f"Device: {about['device']}.", ""]
    lines += [
        f"| kept of each crop, beside a feature of {result['embed_dim']} | GB per million clips and crop |",
        "|---|---|",
    ]
    lines += [f"| {name} | {size / 1e9:.2f} |" for name, size in result["bytes_per_million_clips"].items()]
    lines += [
        "",
        f"One step of the {result['student']} student, batch {result['batch']}, {result['precision']}, under a teacher "
        f"of {result['teacher']}:",
        "",
        "| | s a step | clips/s |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {value:.3g} | {result['batch'] / value:.3g} |" for name, value in medians.items()]
    terms = ", ".join(f"{name} {value:.1e}" for name, value in result["loss_error"].items())
    lines += [
        "",
        f"Without the teacher a step is {result['speed_up']:.1f} times as fast. Reading a clip's answers takes one of "
        f"the loader's workers {result['read_microseconds_per_clip']:.0f} microseconds. The losses differ by {terms} "
        "(20 of 527 classes stored).",
    ]
    common.write(out, "teach_gpu" if GPU else "teach", result, "\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="small", help="preset of the model that learns")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--smoke", action="store_true", help="a teacher of one narrow block: only to see that it runs")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait in all for an idle machine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.fp16, args.teacher = args.precision == "fp16", (1, 64) if args.smoke else (12, 768)
    args.command = (
        f"python benchmarks/teach.py --student {args.student} --batch {args.batch} --rounds {args.rounds} "
        f"--precision {args.precision}" + (" --smoke" if args.smoke else "")
    )
    distributed.start(DEVICE.type)
    with tempfile.TemporaryDirectory() as folder:
        write(measure(args, Path(folder)), args.out)


if __name__ == "__main__":
    main()
