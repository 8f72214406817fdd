"""``fastsskd predict``: the likeliest classes of recordings, and events in long ones."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastsskd.commands import listening
from fastsskd.commands.arguments import command, positive, share
from fastsskd.errors import UsageError

if TYPE_CHECKING:
    from fastsskd.inference.predict import Prediction

EXAMPLES = """
fastsskd predict --checkpoint runs/mine/checkpoints/iter2-distill a.wav b.mp3
fastsskd predict --checkpoint runs/mine/checkpoints/iter2-distill recordings/ --json
fastsskd predict --checkpoint model.safetensors hour.flac --hop 1 --threshold 0.5 --csv
"""


def add(commands: Any) -> None:
    predict = command(
        commands, "predict", run, "the likeliest classes of recordings, and events in long ones", EXAMPLES
    )
    listening.add_arguments(predict, "model file or its folder; several = mean of probabilities")
    predict.add_argument(
        "--top_k", "--top-k", type=positive, default=5, metavar="N", help="classes (default %(default)s)"
    )
    predict.add_argument(
        "--threshold",
        type=share,
        default=None,
        metavar="X",
        help="only classes with at least this score; hears long recordings whole, and gives events with their times",
    )
    predict.add_argument("--json", action="store_true", help="a JSON list, an object a file")
    predict.add_argument("--csv", action="store_true", help="path,start,end,class,score; a row a window or event")


def run(args: argparse.Namespace) -> int:
    if args.json and args.csv:
        raise UsageError("--json and --csv: choose one")
    from fastsskd.inference.predict import Choice, predict

    loaded = listening.load(args)
    loaded.require_head()
    for path in loaded.untrained():
        print(f"checkpoint {path}: its class head was never trained, so its scores say nothing", file=sys.stderr)
    listener = listening.make_listener(args, loaded, loaded.probabilities, whole=args.threshold is not None)
    files, count = listening.sources(args)
    account = listening.Account(count, args.quiet)
    choice = Choice(loaded.infos[0].classes, args.top_k, args.threshold)
    predictions = _counted(account, account.good(predict(account.watch(listener.listen(files)), choice)))
    if args.json:
        _print_json(predictions, args.threshold)
    elif args.csv:
        _print_csv(predictions, args.threshold)
    else:
        for prediction in predictions:
            print("\n".join(_lines(prediction, args.threshold)), flush=True)
    return account.finish()


def _counted(account: listening.Account, answers: Iterator[tuple[Any, Prediction]]) -> Iterator[Prediction]:
    for _, prediction in answers:
        account.heard(prediction.seconds, prediction.goes_on)
        yield prediction


def _print_json(predictions: Iterator[Prediction], threshold: float | None) -> None:
    """A list that is closed whatever happens, so that what was heard can be read."""
    separator = "["
    try:
        for prediction in predictions:
            said = json.dumps(prediction.to_dict(threshold), ensure_ascii=False)
            print(separator, said, sep="\n", end="", flush=True)
            separator = ","
    finally:
        print("[]" if separator == "[" else "\n]", flush=True)


def _print_csv(predictions: Iterator[Prediction], threshold: float | None) -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(("path", "start", "end", "class", "score"))
    for prediction in predictions:
        for start, end, name, score in _rows(prediction, threshold):
            table.writerow((prediction.name, f"{start:.3f}", f"{end:.3f}", name, f"{score:.6f}"))
        sys.stdout.flush()


def _rows(prediction: Prediction, threshold: float | None) -> list[tuple[float, float, str, float]]:
    """Start, end, class and score of each event, with a threshold; else of each window's likeliest classes."""
    if threshold is not None:
        return [(event.start, event.end, event.name, event.score) for event in prediction.events]
    if prediction.windows:
        return [(window.start, window.end, *pair) for window in prediction.windows for pair in window.top]
    return [(0.0, prediction.seconds, *pair) for pair in prediction.top]


def _lines(prediction: Prediction, threshold: float | None) -> list[str]:
    """For people: a line a recording; or a line a window; or with a threshold a line an event."""
    if prediction.windows and threshold is not None:
        lines = [f"{_span(e.start, e.end)}\t{e.name} {e.score:.3f}" for e in prediction.events]
    elif prediction.windows:
        lines = [f"{_span(w.start, w.end)}\t{_classes(w.top)}" for w in prediction.windows]
    else:
        lines = [_classes(prediction.top)]
    return [f"{prediction.name}\t{line}" for line in lines or ["-"]]


def _classes(top: list[tuple[str, float]]) -> str:
    return "\t".join(f"{name} {score:.3f}" for name, score in top) or "-"


def _span(start: float, end: float) -> str:
    return f"{start:.2f}-{end:.2f} s"
