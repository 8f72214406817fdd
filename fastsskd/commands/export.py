"""``fastsskd export``: a checkpoint as a folder to give away, or as an ONNX file."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fastsskd.commands.arguments import command
from fastsskd.errors import UsageError

EXAMPLES = """
fastsskd export --checkpoint runs/mine/checkpoints/iter2-distill --out dog-model --licence CC-BY-4.0
fastsskd export --checkpoint dog-model --onnx dog.onnx --input waveform
"""


def add(commands: Any) -> None:
    export = command(commands, "export", run, "a checkpoint as a folder to give away, or as an ONNX file", EXAMPLES)
    export.add_argument("--checkpoint", required=True, metavar="C", help="model file or its folder")
    export.add_argument("--out", default=None, metavar="DIR", help="folder for model.safetensors and config.json")
    export.add_argument("--half", action="store_true", help="16-bit weights in --out: half the size")
    export.add_argument("--licence", default=None, metavar="TEXT", help="of the weights; default: what the file says")
    export.add_argument("--onnx", default=None, metavar="FILE", help="ONNX file, opset 18, any batch size")
    export.add_argument(
        "--input",
        choices=("fbank", "waveform"),
        default="fbank",
        help="of the ONNX file: normalised features (B, T, F), or samples (B, S) at 16 kHz (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    if not args.out and not args.onnx:
        raise UsageError("fastsskd export: say what to write: --out DIR, --onnx FILE, or both")
    from fastsskd.inference.export import export_folder, open_checkpoint

    model, info = open_checkpoint(args.checkpoint, args.licence)
    if not info.licence:
        print("no licence is given: --licence says what others may do with the weights", file=sys.stderr)
    if args.out:
        print(export_folder(model, info, args.out, half=args.half), file=sys.stderr)
    if args.onnx:
        from fastsskd.inference.onnx_model import OPSET, export_onnx

        difference = export_onnx(model, info, args.onnx, given=args.input)
        checked = (
            "onnxruntime is not installed, so its answers were not checked"
            if difference is None
            else f"onnxruntime's answers are within {difference:.1g} of the model's"
        )
        print(f"{args.onnx}: opset {OPSET}, input {args.input}; {checked}", file=sys.stderr)
    return 0
