"""How does the speed of training grow with ranks, and what holds it up: the step, the loader or what ranks send?

    python benchmarks/scale.py                                    # 1 rank, 2, 4 ... as many as GPUs or cores; minutes
    python benchmarks/scale.py --manifest my.manifest --config launch/configs/audioset2m.toml --ds_config J --micro 64
    python benchmarks/scale.py --smoke                            # does it still run: nothing to quote

Weak scaling: the micro-batch of a rank stays, the batch grows. For each number of ranks `fastsskd profile` measures the
training loop on cached batches, the loader alone, both together, and what of a step goes when nothing is sent; each
round takes the numbers of ranks in turn, and cells are medians. The ideal of N GPUs is N times one. On a CPU one rank
uses all cores already, so there the ideal is the speed of one.

Results go to ``benchmarks/results/scale.json``, ``.md`` and ``.png``.

Last result, 2026-11-23: two ranks on two cores train 1.2 x (Multi-SSL) and 1.4 x (labels) as fast as one; steps wait
for data 0.4 to 0.7 % of the time.
"""

import argparse
import os
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import common
import torch

RESULTS, LAUNCH = Path(__file__).parent / "results", common.LAUNCH
KINDS = {"ssl": "Multi-SSL", "distill": "labels"}
RUNS = {"cached": "step alone", "loader": "loader alone", "end_to_end": "together"}


def rank_counts(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({most, *(1 << n for n in range(most.bit_length()) if 1 << n <= most)})


def profile(options: argparse.Namespace, kind: str, ranks: int, folder: Path) -> dict:
    """One profile in fresh processes; ``fastsskd profile --json``'s answer."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["-m", "fastsskd.cli", "profile", "--json", "--stage", kind, "--seconds", str(options.seconds)]
    # The micro-batch stays, the batch grows.
    batch = common.batch_file(folder, ranks * options.micro, options.ds_config)
    command += ["--config", str(options.config), "--ds_config", str(batch)]
    for change in (f"data.manifest={options.manifest}", *options.set):
        command += ["--set", change]
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    return common.answer(f"{ranks} rank(s), {kind}", command, threads)


def measure(options: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for each kind of stage and number of ranks."""
    found: dict[tuple[str, int], list[dict]] = {}
    for _ in range(options.rounds):
        for kind in options.kinds:
            for ranks in options.ranks:
                options.watch.wait()
                found.setdefault((kind, ranks), []).append(profile(options, kind, ranks, folder))
    rows = []
    for (kind, ranks), samples in found.items():
        rates = {run: [sample["clips_per_second"][run]["value"] for sample in samples] for run in RUNS}
        row = {"kind": kind, "ranks": ranks, "micro": options.micro, "samples": rates}
        row |= {run: statistics.median(values) for run, values in rates.items()}
        row["communication"] = statistics.median(sample["communication"] for sample in samples)
        row["wait"] = statistics.median(max(r["waits"]["share"] for r in sample["ranks"]) for sample in samples)
        row["verdict"] = statistics.mode(sample["verdict"] for sample in samples)
        one = next((other for other in rows if other["kind"] == kind and other["ranks"] == 1), row)
        ideal = one["end_to_end"] * (ranks / one["ranks"] if torch.cuda.is_available() else 1)
        rows.append(row | {"efficiency": row["end_to_end"] / ideal})
        print({name: value for name, value in rows[-1].items() if name != "samples"}, flush=True)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 3.6), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = [row for row in rows if row["kind"] == kind]
        for run, name in RUNS.items():
            axis.plot([row["ranks"] for row in own], [row[run] for row in own], marker="o", label=name)
        axis.set(
            title=KINDS[kind], xlabel="ranks", ylabel="clips/s", ylim=(0, None), xticks=[row["ranks"] for row in own]
        )
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(rows: list[dict], about: dict, out: Path) -> None:
    device = about["device"]
    lines = ["# Ranks", "", common.machine_line(about), ""]
    lines += [
        f"On {device}; {rows[0]['micro']} clips a rank. Efficiency: against "
        + ("N times one rank." if about["on_gpu"] else "one rank, since ranks share the cores."),
        "",
        "| stage | ranks | "
        + " | ".join(f"{name}, clips/s" for name in RUNS.values())
        + " | sent | waits | efficiency |",
        "|---|---|" + "---|" * (len(RUNS) + 3),
    ]
    for row in rows:
        rates = " | ".join(f"{row[run]:.4g}" for run in RUNS)
        shares = f"{100 * row['communication']:.1f} % | {100 * row['wait']:.1f} %"
        lines.append(
            f"| {KINDS[row['kind']]} | {row['ranks']} | {rates} | {shares} | {100 * row['efficiency']:.0f} % |"
        )
    lines += [
        "",
        "Sent: the share of a step that goes when nothing is sent. Waits: of the rank that waits most for data.",
    ]
    lines += ["", "![clips a second by ranks](scale.png)"]
    common.write(out, "scale", {"machine": about, "rows": rows}, "\n".join(lines) + "\n")
    draw(rows, out / "scale.png")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, help="clips to train on; default: the quickstart's, generated")
    parser.add_argument("--config", type=Path, default=LAUNCH / "configs" / "quickstart.toml")
    parser.add_argument("--ds_config", type=Path, default=LAUNCH / "ds_config.json")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field of the TOML")
    parser.add_argument("--micro", type=int, default=12, help="clips of a rank's batch (default %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1, 2, 4 ... all GPUs, or all cores")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="stages (default: both)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one profile (default %(default)g)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait in all for an idle machine")
    parser.add_argument("--smoke", action="store_true", help="two ranks, briefly: only to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    options.ranks = options.ranks or rank_counts(torch.cuda.device_count() if on_gpu else os.cpu_count() or 1)
    if options.smoke:
        options.rounds, options.seconds, options.patience, options.ranks = 1, 2.0, 0.0, [1, 2]
        options.kinds, options.micro = ["distill"], 4
        options.set += ["model.size=nano", "data.seconds=1"]
    options.watch = common.IdleWatch(options.patience)
    command = "python benchmarks/" + " ".join([Path(__file__).name, *sys.argv[1:]])
    about = common.machine({name: version(name) for name in ("torch", "deepspeed")}, command)
    about |= {"on_gpu": on_gpu, "device": torch.cuda.get_device_name() if on_gpu else about["cpu"]}
    with tempfile.TemporaryDirectory() as folder:
        options.manifest = (options.manifest or common.sounds(Path(folder))).absolute()
        rows = measure(options, Path(folder))
    write(rows, about | {"samples_on_an_idle_machine": str(options.watch)}, options.out)


if __name__ == "__main__":
    main()
