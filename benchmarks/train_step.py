"""How fast is a Multi-SSL step, against the paper's pseudo code taken literally and against the machine's limit?

    python benchmarks/train_step.py                # base size, batch 8, every lever; on a GPU where there is one
    python benchmarks/train_step.py --size tiny    # quicker

The literal pseudo code: three eager float32 passes of the AFT, all with gradients, and an MAE module that sees masked
tokens too. Ours: the step that training runs, through DeepSpeed. Then ours again with one lever at a time taken back or
tried and not taken. Rows are timed in turn, round after round; a cell is the median. Model FLOPs are counted by
``fastsskd.flops`` (tests/test_flops.py holds that against torch's own count) and divided by the rate of large matrix
products measured in the same run: that is the utilisation. The labelled step follows, alone and under AST and BEATs of
their published sizes: what share of it is the teacher's. Results go to ``benchmarks/results/train_step.{json,md}``.

Last result, 2026-11-22: on two CPU cores 3.9 x the pseudo code at base size, 73 % of the measured bf16 peak.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import common
import deepspeed
import torch
from literal_step import ForcedAttention, Literal, MaskedTokensToo, Plain, ThreePasses
from step_models import CLASSES, beats, save_ast, student

import fastsskd_kernels as kernels
from fastsskd import distributed, flops
from fastsskd.batch import Batch
from fastsskd.config import LossConfig, MaskConfig, OptimConfig, StageConfig
from fastsskd.model import build_model, fused_attention
from fastsskd.patches import num_input_frames
from fastsskd.pretrain import Pretrain
from fastsskd.schedule import build_optimizer
from fastsskd.teachers import load_teacher

RESULTS = Path(__file__).parent / "results"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Setting:
    """Makes engines for one size, batch and precision."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.precision = args, "fp16" if args.fp16 else "bf16"

    def module(self, kind: type = Pretrain, *, checkpointing: bool = False, **loss: object) -> Pretrain:
        model = build_model(self.args.size, 527, seconds=self.args.seconds, activation_checkpointing=checkpointing)
        return kind(model, replace(LossConfig(), **loss), MaskConfig(), self.args.batch)

    def engine(self, module: Pretrain, *, precision: str | None = None, **optimizer: object) -> object:
        """DeepSpeed with ZeRO-1, as launch/ds_config.json has it."""
        precision = precision or self.precision
        adam = build_optimizer(module, StageConfig(epochs=1, lr=1e-4, warmup_epochs=0.0), OptimConfig())
        for group in adam.param_groups:
            group.update(optimizer)
        adam.defaults.update(optimizer)
        config = {
            "train_batch_size": self.args.batch,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1 if precision != "fp32" else 0},
            "zero_allow_untested_optimizer": True,
        }
        if precision != "fp32":
            config[precision] = {"enabled": True}
        engine, *_ = deepspeed.initialize(model=module.to(DEVICE), optimizer=adam, config=config)
        return engine

    def rows(self) -> dict[str, Callable[[], object]]:
        """Name -> what makes the engine; first the two that the requirement is about."""

        def literal() -> object:
            return Plain(ForcedAttention(self.module(Literal, raw_gradient=True), fused=False), DEVICE)

        def other_attention() -> object:
            return self.engine(ForcedAttention(self.module(), fused=not fused))

        def compiled() -> object:
            module = self.module()
            for i, block in enumerate(module.model.blocks):
                module.model.blocks[i] = torch.compile(block)
            return self.engine(module)

        fused = fused_attention(DEVICE, torch.bfloat16 if self.precision == "bf16" else torch.float16)
        rows = {
            "literal pseudo code, float32": literal,
            "ours": lambda: self.engine(self.module()),
            "raw view with gradient": lambda: self.engine(self.module(raw_gradient=True)),
            "masked views in two passes": lambda: self.engine(self.module(ThreePasses)),
            "MAE module on all tokens": lambda: self.engine(self.module(MaskedTokensToo)),
            "attention not fused" if fused else "fused attention": other_attention,
            "float32": lambda: self.engine(self.module(), precision="fp32"),
            "activation checkpointing": lambda: self.engine(self.module(checkpointing=True)),
            "+ torch.compile of the blocks": compiled,
            "+ fused AdamW": lambda: self.engine(self.module(), fused=True, foreach=False),
        }
        return rows if self.args.levers else dict(list(rows.items())[:2])


def labelled_rows(setting: Setting, folder: Path) -> dict[str, Callable[[], object]]:
    """The labelled step, without a teacher and under two: name -> what makes the engine."""

    depth = 1 if setting.args.smoke else 12

    def under(teacher: object) -> object:
        return setting.engine(student(setting.args.size, teacher))

    return {
        "labels only": lambda: under(None),
        "labels and AST": lambda: under(load_teacher(**save_ast(folder, depth)).to(DEVICE)),
        "labels and BEATs": lambda: under(beats(depth).to(DEVICE)),
    }


def make_batch(size: int, seconds: float) -> Batch:
    """Clips of coloured noise with everything a step needs."""
    noise = torch.randn(size, round(seconds * 16000), generator=torch.Generator().manual_seed(0)) * 0.1
    fbank, hog = kernels.features(noise, num_frames=num_input_frames(seconds))
    index = torch.arange(size)
    seeds = torch.from_numpy(kernels.derive_seeds(0, 0, index.numpy()))
    return Batch(fbank, hog, index % 10, [str(i) for i in range(size)], index, seeds, waveform=noise).to(DEVICE)


def one_step(engine: object, batch: Batch) -> None:
    loss, _ = engine(batch)
    engine.backward(loss)
    engine.step()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of a call, the device's work included."""
    if GPU:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the best of some large matrix products."""
    best = 0.0
    for m, k, n in ((4096, 768, 3072), (4096, 3072, 768), (2048, 2048, 2048), (8192, 8192, 8192))[: 4 if GPU else 3]:
        a, b = torch.randn(m, k, device=DEVICE, dtype=dtype), torch.randn(k, n, device=DEVICE, dtype=dtype)
        times = [seconds_of(lambda a=a, b=b: a @ b) for _ in range(30 if GPU else 8)]
        best = max(best, 2.0 * m * k * n / min(times))
    return best


def host_waits(engine: object, batch: Batch) -> int | None:
    """Calls in three steps that make the host wait for the GPU; None without one."""
    if not GPU:
        return None
    with torch.profiler.profile(activities=list(torch.profiler.ProfilerActivity.__members__.values())[:2]) as profile:
        for _ in range(3):
            one_step(engine, batch)
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
    return sum(event.count for event in profile.key_averages() if event.key in waits)


def measure(args: argparse.Namespace) -> dict:
    setting, batch, watch = Setting(args), make_batch(args.batch, args.seconds), common.IdleWatch(args.patience)
    peaks: dict[str, list[float]] = {"bf16": [], "fp32": []}
    found = {name: time_row(name, make, batch, args, watch, peaks) for name, make in setting.rows().items()}
    labelled = {}
    if args.teachers:
        # Hundreds of classes, several to a clip, as in AudioSet.
        several = replace(batch, label=torch.nn.functional.one_hot(batch.label, len(CLASSES)).float())
        with tempfile.TemporaryDirectory() as folder:
            for name, make in labelled_rows(setting, Path(folder)).items():
                labelled[name] = time_row(name, make, several, args, watch, peaks)
    return report(args, found, labelled, {name: statistics.median(values) for name, values in peaks.items()}, watch)


def time_row(
    name: str,
    make: Callable[[], object],
    batch: Batch,
    args: argparse.Namespace,
    watch: common.IdleWatch,
    peaks: dict[str, list[float]],
) -> dict:
    """Seconds of each step of one row, between measurements of the matrix products' peak; on a GPU also its memory."""
    row: dict = {"seconds": []}
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    watch.wait()
    try:
        engine = make()
        one_step(engine, batch)  # allocations, compilation
        for _ in range(args.rounds):
            peaks["bf16"].append(matrix_peak(torch.bfloat16))
            peaks["fp32"].append(matrix_peak(torch.float32))
            watch.wait()
            row["seconds"].append(seconds_of(lambda: one_step(engine, batch)))
        if name == "ours":
            row["host_waits_in_3_steps"] = host_waits(engine, batch)
    except (RuntimeError, ValueError) as error:  # no room, or not possible here: said in the table
        row["failed"] = str(error).splitlines()[0][:120]
    if GPU:
        row["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    engine = None
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    print(name, row, flush=True)
    return row


def report(
    args: argparse.Namespace, found: dict, labelled: dict, peaks: dict[str, float], watch: common.IdleWatch
) -> dict:
    counted = flops.pretrain_step(args.size, args.seconds)
    work = counted.total * args.batch
    for row in labelled.values():
        if row["seconds"]:
            row["median_s"] = statistics.median(row["seconds"])
            alone = labelled["labels only"].get("median_s")
            row["share_of_teacher"] = None if alone is None else max(1.0 - alone / row["median_s"], 0.0)
    for row in found.values():
        if row["seconds"]:
            row["median_s"] = statistics.median(row["seconds"])
            row["clips_per_second"] = args.batch / row["median_s"]
            row["utilisation"] = work / row["median_s"] / peaks["bf16"]
    ours, literal = found["ours"], found["literal pseudo code, float32"]
    verdicts = []
    if "median_s" in literal:
        gain = literal["median_s"] / ours["median_s"]
        verdicts.append(common.verdict("ours against the literal pseudo code", gain, ">=", 5.0, "x"))
    share = 100 * ours["utilisation"]
    verdicts.append(common.verdict("model FLOPs of the measured 16-bit matrix peak", share, ">=", 50.0, "%"))
    versions = {name: version(name) for name in ("torch", "deepspeed", "timm")}
    command = f"python benchmarks/train_step.py --size {args.size} --batch {args.batch} --rounds {args.rounds}"
    about = common.machine(versions, command) | {"samples_on_an_idle_machine": str(watch)}
    about["device"] = torch.cuda.get_device_name() if GPU else "CPU"
    parts = {name: getattr(counted, name) / 1e9 for name in ("raw", "intra", "inter", "mae", "decoder")}
    return {
        "machine": about,
        "size": args.size,
        "batch": args.batch,
        "gigaflops_per_clip": {**parts, "total": counted.total / 1e9},
        "peaks_teraflops": {name: value / 1e12 for name, value in peaks.items()},
        "rows": found,
        "labelled": labelled,
        "verdicts": verdicts,
    }


def write(result: dict, out: Path) -> None:
    about, parts, ours = result["machine"], result["gigaflops_per_clip"], result["rows"]["ours"]["median_s"]
    lines = ["# Training step", "", common.machine_line(about), "", f"Device: {about['device']}.", ""]
    lines += [
        f"One Multi-SSL step of the {result['size']} model, batch {result['batch']}, clips in memory. Matrix products "
        f"of one clip: {parts['total']:.0f} GFLOP ("
        + ", ".join(f"{name} {value:.0f}" for name, value in parts.items() if name != "total")
        + "). Measured peaks: "
        + ", ".join(f"{name} {value:.2f} TFLOP/s" for name, value in result["peaks_teraflops"].items())
        + ".",
        "",
        *common.verdict_lines(result["verdicts"]),
        "",
        "| | s a step | clips/s | against ours | utilisation | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        if "median_s" not in row:
            lines.append(f"| {name} | {row.get('failed', 'not measured')} | | | | |")
            continue
        lines.append(
            f"| {name} | {row['median_s']:.3g} | {row['clips_per_second']:.3g} | {row['median_s'] / ours:.2f} | "
            f"{100 * row['utilisation']:.0f} % | {row.get('peak_gigabytes', '')} |"
        )
    lines += labelled_lines(result)
    waits = result["rows"]["ours"].get("host_waits_in_3_steps")
    lines += ["", f"Host waits for the device in three steps: {'not measured (no GPU)' if waits is None else waits}."]
    common.write(out, "train_step_gpu" if GPU else "train_step", result, "\n".join(lines) + "\n")
    print("\n".join(lines))


def labelled_lines(result: dict) -> list[str]:
    if not result["labelled"]:
        return []
    lines = ["", f"The labelled step of the {result['size']} model, {len(CLASSES)} classes, the same clips:", ""]
    lines += ["| | s a step | the teacher's share of it | peak GB |", "|---|---|---|---|"]
    for name, row in result["labelled"].items():
        if "median_s" not in row:
            lines.append(f"| {name} | {row.get('failed', 'not measured')} | | |")
            continue
        share = row["share_of_teacher"]
        cells = [f"{row['median_s']:.3g}", "" if not share else f"{100 * share:.0f} %", row.get("peak_gigabytes", "")]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fp16", action="store_true", help="as on a V100, instead of bf16")
    parser.add_argument("--smoke", action="store_true", help="teachers of one block, to see that everything runs")
    parser.add_argument("--no-levers", dest="levers", action="store_false", help="only ours and the literal one")
    parser.add_argument("--no-teachers", dest="teachers", action="store_false", help="leave the labelled step out")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait in all for an idle machine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    distributed.start(DEVICE.type)
    write(measure(args), args.out)


if __name__ == "__main__":
    main()
