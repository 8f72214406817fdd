"""``fastsskd embed``: features of recordings as a ``.npy`` file, and a table of what its rows are."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from fastsskd.commands import listening
from fastsskd.commands.arguments import command
from fastsskd.errors import InputError, UsageError

LEVELS = ("clip", "window", "frame", "patch")  # fastsskd.inference.loaded has them too, but brings torch with it
EXAMPLES = """
fastsskd embed --checkpoint runs/mine/checkpoints/iter2-distill recordings/ --out features.npy
fastsskd embed --checkpoint model.safetensors hour.flac --level frame --out frames.npy
"""


def add(commands: Any) -> None:
    embed = command(commands, "embed", run, "features of recordings as a .npy file, its rows named in a .tsv", EXAMPLES)
    listening.add_arguments(embed, "model file or its folder")
    embed.add_argument("--out", required=True, metavar="NPY", help="file to write, and a .tsv beside it")
    embed.add_argument(
        "--level",
        choices=LEVELS,
        default="clip",
        help="clip: (n, D), the mean over a recording; window: (n, D), a row a window; frame: (n, T, D), steps of "
        "160 ms; patch: (n, N, D), time-major (default %(default)s)",
    )
    embed.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.suffix != ".npy":
        raise UsageError(f"--out {out}: end it with .npy")
    from fastsskd.inference.embed import STEP_SECONDS, embed
    from fastsskd.inference.npy_file import NpyFile

    loaded = listening.load(args)
    if len(loaded.models) > 1:
        raise UsageError("fastsskd embed: several models have no features in common; give one checkpoint")
    answer = partial(loaded.embedding, level=args.level)
    listener = listening.make_listener(args, loaded, answer, whole=args.level == "window")
    files, count = listening.sources(args)
    account = listening.Account(count, args.quiet)
    model = loaded.models[0]
    steps = {"frame": model.grid_size[:1], "patch": (model.num_patches,)}.get(args.level, ())
    rows: list[tuple[str, float, float]] = []
    with NpyFile(out, (*steps, model.embed_dim)) as table:
        for source, features in account.good(embed(account.watch(listener.listen(files)), args.level)):
            table.append(features.rows)
            rows += [(source.name, *times) for times in features.times]
            account.heard(features.times[-1][1], features.goes_on)
        if not rows:
            raise InputError(f"{out}: not written, as no recording could be used")
    _write_names(out.with_suffix(".tsv"), rows)
    if args.json:
        said = {"out": str(out), "rows": str(out.with_suffix(".tsv")), "shape": [table.num_rows, *table.row_shape]}
        said |= {"level": args.level, "files": list(dict.fromkeys(name for name, *_ in rows))}
        print(json.dumps(said | ({"step_seconds": STEP_SECONDS} if steps else {}), indent=1))
    else:
        print(f"{out}: {table.num_rows} rows of {' x '.join(map(str, table.row_shape))}", file=sys.stderr)
    return account.finish()


def _write_names(path: Path, rows: list[tuple[str, float, float]]) -> None:
    """One line a row, in its order."""
    from fastsskd.durable import write_text

    lines = [f"{name}\t{start:.3f}\t{end:.3f}" for name, start, end in rows]
    write_text(path, "\n".join(["path\tstart\tend", *lines]) + "\n")
