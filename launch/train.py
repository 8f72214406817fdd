"""The main job: ``deepspeed launch/train.py --ds_config J --config T [--set a.b=c ...] [--resume]``.

Runs the whole recipe, or the stages that the config names. ``torchrun`` and plain ``python`` work too.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys

from fastsskd import config, config_help, ds_config
from fastsskd.errors import InputError, SharedError

EXAMPLES = """\
examples:
  deepspeed launch/train.py --ds_config launch/ds_config.json --config launch/configs/quickstart.toml
  deepspeed launch/train.py --ds_config launch/ds_config_a100.json --config launch/configs/esc50.toml \\
      --set data.manifest=my.manifest --set run.out=runs/mine --resume
  python launch/train.py --config launch/configs/esc50.toml --set model.size=small --print-config
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train: Multi-SSL, then labels and distillation, iterated; evaluate; write RUN/result.json.",
        epilog=EXAMPLES + "\nFields of the TOML, with their defaults:\n\n" + config_help.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ds_config", help="DeepSpeed JSON: batch sizes, precision, ZeRO, clipping, logs; required")
    parser.add_argument("--config", required=True, help="TOML: everything else; presets are in launch/configs/")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field of the TOML")
    parser.add_argument("--resume", action="store_true", help="continue the run in run.out")
    parser.add_argument(
        "--print-config", "--print_config", action="store_true", help="print the TOML with all its fields, and stop"
    )
    parser.add_argument("--local_rank", type=int, default=None, help="given by launchers; the environment decides")
    args = parser.parse_args(arguments)
    if not args.ds_config and not args.print_config:
        parser.error("the following arguments are required: --ds_config")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        settings = config.load(args.config, args.set)
        if args.print_config:
            print(config.to_toml(settings), end="")
            return 0
        deepspeed_config = ds_config.load(args.ds_config)
        return run(settings, deepspeed_config, args.resume)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def run(settings: config.Config, deepspeed_config: dict, resume: bool) -> int:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ds_config.check_device(deepspeed_config, device)
    from fastsskd import distributed

    distributed.start(device, settings.run.timeout)
    from fastsskd.engine import Stopped
    from fastsskd.recipe import Recipe
    from fastsskd.report.run_table import show
    from fastsskd.run_folder import RunFolder

    folder = RunFolder(settings, resume)
    recipe = Recipe(settings, deepspeed_config, device, folder)
    try:
        result = recipe.run()
    except Stopped as stopped:
        folder.finish({"status": "stopped", "reason": str(stopped)})
        folder.say(f"{stopped}; continue with --resume")
        return 1
    except Exception as error:
        reason = explain(error)
        folder.fail(reason)
        alone = isinstance(reason, InputError) and not isinstance(reason, SharedError)
        if alone and not folder.is_writer:  # rank 0 speaks in main
            print(f"error (rank {distributed.rank()}): {reason}", file=sys.stderr, flush=True)
        if reason is error:
            raise
        raise reason from None
    if folder.is_writer:
        print(show(folder.path, result))
    return 0


def explain(error: Exception) -> Exception:
    """The one line for what is nobody's mistake: another rank has ended, or the disk is full."""
    from fastsskd import distributed

    if distributed.lost_contact(error):
        return InputError(
            f"rank {distributed.rank()} lost contact with another rank, which was killed or stands still; --resume "
            f"continues from the last checkpoint ({str(error).strip().splitlines()[0][:160]})"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(f"{error.filename or 'the run'}: {error.strerror}; make room, then --resume")
    return error


if __name__ == "__main__":
    sys.exit(main())
