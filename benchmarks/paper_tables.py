"""What becomes of the paper's tables on my data?

    python benchmarks/paper_tables.py --table 1 2 3 4 5 6 9 --config launch/configs/esc10.toml \\
        --set data.manifest=esc10.manifest --seeds 0 1 2 --parallel 2 --out runs/tables
    python benchmarks/paper_tables.py --table 8 ... --teacher AST=audioset_10_10_0.4593.pth --teacher BEATS=beats.pt
    python benchmarks/paper_tables.py --table 7 ... --imagenet deit_base_patch16_224.pth
    python benchmarks/paper_tables.py --table 12 --checkpoint "mine (iter3)=runs/esc50/checkpoints/iter3-distill" \\
        --manifest esc50.manifest --folds 5

Tables 1 to 9 train their rows: every row with every seed, and with every fold in turn where the manifest has folds and
the configuration names no evaluation set. Rows that tables share are trained once; the same command goes on where it
was stopped, and more seeds, folds or tables can be asked for later. Multi-SSL on clips of its own (data.ssl_manifest)
knows of no fold: it is trained once for all folds of a row and seed.

The paper's numbers stand beside ours. A row's gain is over the row before it and over the table's first row, from pairs
of trainings with the same fold and seed: mean and standard error. Data with one label a clip gets each table twice, in
accuracy and in mAP. Tables 10 to 12 evaluate checkpoints, several behind one name (separated by commas) as an ensemble.
Results go to ``OUT/tables.{json,md}``.
"""

import argparse
import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import common
from paper_rows import METHODS, ROWS, SSL, TABLES, Entry

from fastsskd.config import Config
from fastsskd.config import load as load_config
from fastsskd.errors import InputError, UsageError
from fastsskd.evaluation.kfold import gain, metrics_by_stage, paired, plan
from fastsskd.many_runs import Job, JobsFailed, run_many

LAUNCHER = Path(__file__).parents[1] / "launch" / "train.py"
Key = tuple[str, int | None, int]  # row, fold (None without folds), seed


def rows_of(args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The overrides of each row that the wanted tables need; rows whose file was not given are left out."""
    rows = dict(ROWS)
    for text in args.teacher:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UsageError(f"--teacher {text}: write it as NAME=FILE")
        rows[f"teacher-{name}"] = (*SSL, f"distill.teacher={json.dumps(path)}")
    if args.imagenet:
        rows["imagenet"] = (*ROWS["multi-ssl"], f"model.init={json.dumps(args.imagenet)}")
    wanted = {entry.row for number in args.table if number in TABLES for entry in TABLES[number][1]}
    return {name: overrides for name, overrides in rows.items() if name in wanted}


def jobs_of(args: argparse.Namespace) -> tuple[list[Job], dict[Key, Job]]:
    """Multi-SSL that several trainings begin with, and every training, by row, fold and seed; seed after seed."""
    shared, jobs = [], {}
    for seed in args.seeds:
        for row, own in rows_of(args).items():
            overrides = (*args.set, *own)
            settings = load_config(args.config, overrides)
            if knows_no_fold(settings):
                first = Job(f"{row}-ssl-seed{seed}", (*overrides, f"run.seed={seed}", 'recipe.stages=["ssl"]'))
                shared.append(first)
                init = args.out.resolve() / first.name / "checkpoints" / "iter1-ssl"
                overrides = (*overrides, 'recipe.stages=["distill"]', f"model.init={json.dumps(str(init))}")
            for job, fold in of_folds(settings, overrides, args.folds, seed):
                jobs[row, fold, seed] = Job(f"{row}-{job.name}", job.overrides)
    return shared, jobs


def knows_no_fold(settings: Config) -> bool:
    """Whether Multi-SSL is the same for every fold: once, on clips of its own."""
    once = settings.recipe.iterations == 1 and tuple(settings.recipe.stages) == ("ssl", "distill")
    return once and bool(settings.data.ssl_manifest)


def of_folds(
    settings: Config, overrides: tuple[str, ...], folds: tuple[int, ...], seed: int
) -> list[tuple[Job, int | None]]:
    if settings.data.eval_manifest or settings.data.eval_folds:
        return [(Job(f"seed{seed}", (*overrides, f"run.seed={seed}")), None)]
    try:
        return [(job, fold) for job, fold, _ in plan(settings, overrides, folds, (seed,))]
    except InputError:
        if folds:
            raise
    return [(Job(f"seed{seed}", (*overrides, f"run.seed={seed}")), None)]  # the manifest's own split


def values_of(entry: Entry, results: dict[Key, dict], metric: str) -> dict[tuple[int | None, int], float]:
    """The metric of each training of a row, by fold and seed."""
    found = {
        (fold, seed): metrics_by_stage(own).get(entry.stage)
        for (row, fold, seed), own in results.items()
        if row == entry.row
    }
    return {key: metrics[metric] for key, metrics in found.items() if metrics is not None}


def summarise(entry: Entry, values: dict[str, dict], first: str, before: str | None) -> dict:
    """One row: mean over its trainings, spread over seeds, gains over other rows from pairs of trainings."""
    own = values[entry.label]
    row = {"label": entry.label, "row": entry.row, "stage": entry.stage, "trainings": len(own)}
    row["paper"] = {"audioset": entry.audioset, "vggsound": entry.vggsound}
    if not own:
        return row
    row["mean"] = statistics.fmean(own.values())
    row["values"] = [
        {"fold": fold, "seed": seed, "value": value} for (fold, seed), value in sorted(own.items(), key=str)
    ]
    folds = {fold for fold, _ in own}
    whole = [seed for seed in {seed for _, seed in own} if all((fold, seed) in own for fold in folds)]
    of_seeds = [statistics.fmean(own[fold, seed] for fold in folds) for seed in whole]
    row["std_seeds"] = statistics.stdev(of_seeds) if len(of_seeds) > 1 else None
    for name, other in (("over_first", first), ("over_before", before)):
        row[name] = paired(own, values[other]) if other not in (None, entry.label) else None
    return row


def make_table(number: int, results: dict[Key, dict], metric: str) -> dict:
    title, entries = TABLES[number]
    values = {entry.label: values_of(entry, results, metric) for entry in entries}
    rows, before = [], None
    for entry in entries:
        rows.append(summarise(entry, values, entries[0].label, before))
        before = entry.label if values[entry.label] else before
    return {"number": number, "title": title, "metric": metric, "rows": rows}


def page_of(table: dict) -> list[str]:
    """A table in Markdown."""
    metric = table["metric"]
    lines = [f"## Table {table['number']}: {table['title']}, {metric}", ""]
    lines += [
        f"| | paper, AudioSet 20K | paper, VGGSound 20K | ours, {metric} | std over seeds | over the row above | "
        "over the first | trainings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        paper = [number(row["paper"][name]) for name in ("audioset", "vggsound")]
        if "mean" in row:
            own = [number(row["mean"]), number(row["std_seeds"]), gain(row["over_before"]), gain(row["over_first"])]
        else:
            own = [NOT_RUN.get(row["row"].partition("-")[0], "not run"), "", "", ""]
        lines.append("| " + " | ".join([row["label"], *paper, *own, str(row["trainings"])]) + " |")
    return [*lines, ""]


NOT_RUN = {"teacher": "not run: --teacher NAME=FILE", "imagenet": "not run: --imagenet FILE"}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def train_tables(args: argparse.Namespace) -> list[dict]:
    """Train what is missing and make the tables; a failed training leaves its place empty and is said at the end."""
    shared, jobs = jobs_of(args)
    files = {"config": args.config, "ds_config": args.ds_config, "out": args.out, "launcher": LAUNCHER}
    cores = {"parallel": args.parallel, "threads": args.threads}
    failed = None
    first = run_many(shared, **files, **cores, keep="models") if shared else {}
    try:
        done = run_many(list(jobs.values()), **files, **cores, keep=args.keep)
    except JobsFailed as error:
        done, failed = error.results, error
    results = {key: done[job.name] for key, job in jobs.items() if job.name in done}
    if not results:
        raise failed
    single = next(iter(results.values()))["metrics"]["accuracy"] is not None
    metrics = ("accuracy", "mAP") if single else ("mAP",)
    tables = [make_table(n, results, metric) for n in args.table if n in TABLES for metric in metrics]
    seconds = sum(result["seconds"] for result in (*first.values(), *results.values()))
    write(args, tables, [f"{len(results)} trainings, {seconds / 3600:.1f} hours together, {args.parallel} at a time."])
    if failed:
        raise failed
    return tables


def checkpoint_table(args: argparse.Namespace, number: int) -> dict:
    """Tables 10 to 12: the paper's list, then the checkpoints on the manifest."""
    from fastsskd.evaluation.evaluate import evaluate
    from fastsskd.loader import open_manifest

    title, methods = METHODS[number]
    clips = open_manifest(args.manifest)
    if args.folds:
        import numpy as np

        clips = clips.select(np.isin(clips.folds, args.folds))
    metric = "mAP" if number == 10 else "accuracy"
    rows = []
    for text in args.checkpoint:
        name, _, paths = text.rpartition("=")
        found = evaluate(paths.split(","), clips)
        if found[metric] is None:
            raise InputError(f"{args.manifest}: has several labels a clip, table {number} wants accuracy")
        rows.append({"label": name or paths, "value": found[metric], "clips": found["num_clips"]})
    return {"number": number, "title": title, "methods": methods, "rows": rows}


def checkpoint_page(table: dict) -> list[str]:
    lines = [f"## Table {table['number']}: {table['title']}", "", "| method | parameters | pre-trained data | result |"]
    lines += ["|---|---|---|---|"]
    lines += [f"| {name} | {size} | {data} | {value:.3f} |" for name, size, data, value in table["methods"]]
    lines += [
        f"| **{row['label']}**, here, {row['clips']} clips | | | **{row['value']:.3f}** |" for row in table["rows"]
    ]
    return [*lines, ""]


def write(args: argparse.Namespace, tables: list[dict], notes: list[str]) -> None:
    versions = {name: version(name) for name in ("torch", "deepspeed", "timm")}
    about = common.machine(versions, "python benchmarks/paper_tables.py " + " ".join(args.command))
    lines = ["# The paper's tables, here", "", f"{about['date']}, {about['cpu']}, {about['cores']} cores. "]
    lines[-1] += f"`{about['command']}`"
    lines += ["", *notes, ""]
    for table in tables:
        lines += checkpoint_page(table) if "methods" in table else page_of(table)
    common.write(args.out, "tables", {"machine": about, "notes": notes, "tables": tables}, "\n".join(lines))
    print("\n".join(lines))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, nargs="+", required=True, choices=sorted({*TABLES, *METHODS}))
    parser.add_argument("--config", type=Path, help="TOML of the trainings")
    parser.add_argument("--ds_config", type=Path, default=LAUNCHER.with_name("ds_config.json"))
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field of the TOML")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folds", type=int, nargs="+", default=(), help="to evaluate on; default: all")
    parser.add_argument(
        "--teacher", action="append", default=[], metavar="NAME=FILE", help="AST, SPFA or BEATS, Table 8"
    )
    parser.add_argument("--imagenet", default="", metavar="FILE", help="a ViT's weights for Table 7")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=C[,C]", help="Tables 10 to 12")
    parser.add_argument("--manifest", help="Tables 10 to 12: clips to evaluate on")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=None, help="of each")
    parser.add_argument("--keep", choices=("all", "models", "result"), default="result", help="of a complete training")
    parser.add_argument("--out", type=Path, default=Path("runs/tables"))
    args = parser.parse_args(arguments)
    args.command = arguments
    trained = [number for number in args.table if number in TABLES]
    if trained and len(trained) < len(args.table):
        parser.error("Tables 1 to 9 train, 10 to 12 evaluate: ask for them apart")
    if trained and args.config is None:
        parser.error("--config is wanted for Tables 1 to 9")
    if not trained and not (args.checkpoint and args.manifest):
        parser.error("--checkpoint and --manifest are wanted for Tables 10 to 12")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if args.config is not None:
            train_tables(args)
        else:
            write(args, [checkpoint_table(args, number) for number in args.table], [])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
