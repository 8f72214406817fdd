"""How fast is a Multi-SSL step, against the paper's pseudo code taken literally and against the machine's limit?

    python benchmarks/train_step.py                # base size, batch 8, every lever; on a GPU where there is one
    python benchmarks/train_step.py --size tiny    # quicker

The literal pseudo code: three eager float32 passes of the AFT, all with gradients, and an MAE module that sees masked
tokens too; it has a process of its own, before the rest. Ours: the step that training runs, through DeepSpeed. Then
ours again with one lever at a time taken back or tried and not taken. Each step of a row is timed right beside one of
ours: "against ours" is the median of those pairs, so a machine whose speed comes and goes changes both sides. Model
FLOPs are counted by ``fastsskd.flops`` (tests/test_flops.py holds that against torch's own count) and divided by the
rate of large matrix products right before and after each step: that is the utilisation. On a CPU each row has besides
what its step would take without neighbours on the same processor: ``step_timing.Operations``. The labelled step
follows, alone and under AST and BEATs of their published sizes: what share of it is the teacher's. Results go to
``benchmarks/results/train_step.{json,md}``.

Last result, 2026-11-22: on two CPU cores 3.9 x the pseudo code at base size, 73 % of the measured bf16 peak.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import common
import deepspeed
import torch
from literal_step import Literal, MaskedTokensToo, Plain, ThreePasses, with_timm_attention, with_torchs_layers
from step_models import CLASSES, beats, save_ast, student
from step_timing import DEVICE, GPU, Rows, matrix_units, peak_of, spared

import fastsskd_kernels as kernels
from fastsskd import distributed, flops
from fastsskd.attention import fused_attention
from fastsskd.batch import Batch
from fastsskd.config import LossConfig, MaskConfig, OptimConfig, StageConfig
from fastsskd.model import build_model
from fastsskd.patches import num_input_frames
from fastsskd.pretrain import Pretrain
from fastsskd.schedule import build_optimizer
from fastsskd.teachers import load_teacher

RESULTS = Path(__file__).parent / "results"
LITERAL, CLONES = "literal pseudo code, float32", "two masks of each kind a clip"


class Setting:
    """Makes engines for one size, batch and precision."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.precision = args, "fp16" if args.fp16 else "bf16"

    def module(
        self, kind: type = Pretrain, *, checkpointing: bool = False, clones: int = 1, **loss: object
    ) -> Pretrain:
        model = build_model(self.args.size, 527, seconds=self.args.seconds, activation_checkpointing=checkpointing)
        return kind(model, replace(LossConfig(), **loss), MaskConfig(clones=clones), self.args.batch)

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
        """Name -> what makes the engine; ours first."""

        def timm_attention(fused: bool) -> object:
            return self.engine(with_timm_attention(self.module(), fused=fused))

        def compiled() -> object:
            module = self.module()
            for i, block in enumerate(module.model.blocks):
                module.model.blocks[i] = torch.compile(block)
            return self.engine(module)

        own_products = not fused_attention(DEVICE, torch.bfloat16 if self.precision == "bf16" else torch.float16)
        on_a_cpu = {
            "fused attention": lambda: timm_attention(True),
            "linear maps, GELU and norms as torch's": lambda: self.engine(with_torchs_layers(self.module())),
        }
        rows = {
            "ours": lambda: self.engine(self.module()),
            "raw view with gradient": lambda: self.engine(self.module(raw_gradient=True)),
            "masked views in two passes": lambda: self.engine(self.module(ThreePasses)),
            "MAE module on all tokens": lambda: self.engine(self.module(MaskedTokensToo)),
            **(on_a_cpu if own_products else {}),
            "attention as plain products of all clips": lambda: timm_attention(False),
            "float32": lambda: self.engine(self.module(), precision="fp32"),
            "activation checkpointing": lambda: self.engine(self.module(checkpointing=True)),
            "+ torch.compile of the blocks": compiled,
            CLONES: lambda: self.engine(self.module(clones=2)),
            "AdamW not fused": lambda: self.engine(self.module(), fused=False),
        }
        return rows if self.args.levers else {"ours": rows["ours"]}

    def literal(self) -> object:
        return Plain(with_timm_attention(self.module(Literal, raw_gradient=True), fused=False), DEVICE)


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


def literal_alone(args: argparse.Namespace) -> dict:
    """The row of the literal pseudo code, from a process of its own: a plain script has none of our settings (the C
    library's memory, see ``distributed.start``), and there would be no room for it beside ours."""
    options = [f"--{name}={getattr(args, name)}" for name in ("size", "batch", "seconds", "rounds", "patience")]
    options += ["--fp16"] if args.fp16 else []
    return common.answer(LITERAL, [sys.executable, __file__, "--literal", *options])


def measure(args: argparse.Namespace) -> dict:
    """The result; what there is of it is written after each row: an hour is not lost with the last one."""
    setting, batch = Setting(args), make_batch(args.batch, args.seconds)
    rows = Rows(args)
    found, labelled = {LITERAL: literal_alone(args)}, {}

    def keep() -> None:
        write(report(args, found, labelled, rows), args.out)

    rows.all(setting.rows(), batch, "ours", found, keep)
    if args.teachers:
        # Hundreds of classes, several to a clip, as in AudioSet.
        several = replace(batch, label=torch.nn.functional.one_hot(batch.label, len(CLASSES)).float())
        with tempfile.TemporaryDirectory() as folder:
            rows.all(labelled_rows(setting, Path(folder)), several, "labels only", labelled, keep)
    return report(args, found, labelled, rows)


def report(args: argparse.Namespace, found: dict, labelled: dict, rows: Rows) -> dict:
    counted, clones = (flops.pretrain_step(args.size, args.seconds, clones=number) for number in (1, 2))
    ours, literal = found["ours"], found[LITERAL]
    beside = statistics.median(ours["seconds"])
    literal["times_reference"] = [seconds / beside for seconds in literal["seconds"]]
    if "spared_s" in literal:
        literal["spared_times_reference"] = literal["spared_s"] / ours["spared_s"]
    for row in (*found.values(), *labelled.values()):
        if row["seconds"]:
            row["median_s"] = statistics.median(row["seconds"])
            row["clips_per_second"] = args.batch / row["median_s"]
        if row["times_reference"]:
            row["ratio"] = statistics.median(row["times_reference"])
    for row in found.values():
        if row["seconds"]:
            # Of means: where the peak comes and goes within a step, neither end of it tells the step's own.
            work = (clones if row is found.get(CLONES) else counted).total * args.batch
            row["utilisation"] = work / statistics.mean(row["seconds"]) / statistics.mean(row["peaks"])
    for row in labelled.values():
        row["share_of_teacher"] = max(1.0 - 1.0 / row.get("ratio", 1.0), 0.0)
    verdicts = []
    if "ratio" in literal:
        verdicts.append(common.verdict("ours against the literal pseudo code", literal["ratio"], ">=", 5.0, "x"))
    share = 100 * ours["utilisation"]
    verdicts.append(common.verdict("model FLOPs of the measured 16-bit matrix peak", share, ">=", 50.0, "%"))
    best_peak = peak_of(rows.products, spared)
    if "spared_times_reference" in literal:
        share = 100 * counted.total * args.batch / ours["spared_s"] / best_peak
        verdicts += [
            common.verdict(
                "without neighbours: against the pseudo code", literal["spared_times_reference"], ">=", 5.0, "x"
            ),
            common.verdict("without neighbours: of the matrix peak", share, ">=", 50.0, "%"),
        ]
    versions = {name: version(name) for name in ("torch", "deepspeed", "timm")}
    command = f"python benchmarks/train_step.py --size {args.size} --batch {args.batch} --rounds {args.rounds}"
    command += "" if args.levers else " --no-levers"
    command += "" if args.teachers else " --no-teachers"
    about = common.machine(versions, command) | {"samples_on_an_idle_machine": str(rows.watch)}
    about["device"] = torch.cuda.get_device_name() if GPU else f"CPU, {matrix_units()}"
    parts = {name: getattr(counted, name) / 1e9 for name in ("raw", "intra", "inter", "mae", "decoder")}
    peaks = [peak for row in found.values() for peak in row["peaks"]]
    return {
        "machine": about,
        "size": args.size,
        "batch": args.batch,
        "gigaflops_per_clip": {**parts, "total": counted.total / 1e9},
        "peaks_teraflops": {
            "fp16" if args.fp16 else "bf16": statistics.median(peaks) / 1e12,
            "fp32": statistics.median(rows.float32_peaks) / 1e12,
            **({} if GPU else {"16 bits without neighbours": best_peak / 1e12}),
        },
        "rows": found,
        "labelled": labelled,
        "verdicts": verdicts,
    }


def write(result: dict, out: Path) -> str:
    """The two files; returns the page."""
    about, parts = result["machine"], result["gigaflops_per_clip"]
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
        "| | s a step | clips/s | against ours | its range | utilisation | "
        + ("peak GB |" if GPU else "s without neighbours | against ours |"),
        "|---|---|---|---|---|---|---|" + ("" if GPU else "---|"),
    ]
    for name, row in result["rows"].items():
        if "median_s" not in row:
            lines.append(f"| {name} | {row.get('failed', 'not measured')} | | | | | |" + ("" if GPU else " |"))
            continue
        pairs = row["times_reference"]
        last = row.get("peak_gigabytes", "") if GPU else " | "
        if "spared_s" in row:
            last = f"{row['spared_s']:.3g} | {row.get('spared_times_reference', 1.0):.2f}"
        lines.append(
            f"| {name} | {row['median_s']:.3g} | {row['clips_per_second']:.3g} | {row.get('ratio', 1.0):.2f} | "
            f"{f'{min(pairs):.2f}-{max(pairs):.2f}' if pairs else ''} | {100 * row['utilisation']:.0f} % | "
            f"{last} |"
        )
    lines += labelled_lines(result)
    waits = result["rows"]["ours"].get("host_waits_in_3_steps")
    lines += ["", f"Host waits for the device in three steps: {'not measured (no GPU)' if waits is None else waits}."]
    page = "\n".join(lines) + "\n"
    common.write(out, "train_step_gpu" if GPU else "train_step", result, page)
    return page


def labelled_lines(result: dict) -> list[str]:
    if not result["labelled"]:
        return []
    lines = ["", f"The labelled step of the {result['size']} model, {len(CLASSES)} classes, the same clips:", ""]
    lines += ["| | s a step | the teacher's share of it |" + (" peak GB |" if GPU else "")]
    lines += ["|---|---|---|" + ("---|" if GPU else "")]
    for name, row in result["labelled"].items():
        cells = [row.get("failed", "not measured"), "", ""]
        if "median_s" in row:
            share = row["share_of_teacher"]
            cells = [f"{row['median_s']:.3g}", f"{100 * share:.0f} %" if share else "", row.get("peak_gigabytes", "")]
        lines.append(f"| {name} | " + " | ".join(map(str, cells if GPU else cells[:2])) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each row, each beside one of ours")
    parser.add_argument("--fp16", action="store_true", help="as on a V100, instead of bf16")
    parser.add_argument("--smoke", action="store_true", help="teachers of one block, to see that everything runs")
    parser.add_argument("--no-levers", dest="levers", action="store_false", help="only ours and the literal one")
    parser.add_argument("--no-teachers", dest="teachers", action="store_false", help="leave the labelled step out")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait in all for an idle machine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--literal", action="store_true", help=argparse.SUPPRESS)  # a process of its own: its row
    args = parser.parse_args()
    if args.literal:
        print(json.dumps(Rows(args).time(LITERAL, Setting(args).literal, make_batch(args.batch, args.seconds)).row))
        return
    distributed.start(DEVICE.type)
    print(write(measure(args), args.out), end="")


if __name__ == "__main__":
    main()
