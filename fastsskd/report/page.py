"""A run's report as one HTML page that needs nothing else: no script, no link, pictures and curves inside."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastsskd.report.curves import stage_charts
from fastsskd.report.data import RunData, StageData, duration
from fastsskd.report.html import details, document, note, section, table
from fastsskd.report.reference import Reference, differences
from fastsskd.report.scores import classes, mistakes
from fastsskd.run_folder import clip_counts

MAX_PICTURES = 4
"""Of a stage; the rest stay in the run's folder."""
MAX_ROWS = 200
"""Of a table of clips."""
SCORES = ("accuracy", "mAP", "AUC", "d_prime")


def page(run: RunData, reference: Reference | None = None) -> str:
    """The whole page; ``reference``: curves to lay behind the run's own."""
    last = run.last_evaluated
    parts = [_head(run), _results(run), _compared(run, reference)]
    parts += [_stage(stage, reference.stages.get(stage.name, ()) if reference else ()) for stage in run.stages]
    if last:
        parts += [classes(last.name, last.metrics), mistakes(last.name, last.scores)]
    parts += [_data(run), _recipe(run), _again(run)]
    return document(f"{run.path.resolve().name}: fastsskd run", parts)


def _head(run: RunData) -> str:
    """Where, how it ended, how large it was, and what went wrong."""
    failed = run.status == "failed"
    problems = [f"the run failed: {run.reason}"] if failed else []
    problems += [f"{stage.name}, step {step}: {text}" for stage in run.stages for step, text in stage.problems]
    problems += [f"cannot be read: {text}" for text in run.unreadable]
    lines = [
        f"<h1>{escape(str(run.path))}</h1>",
        f'<p><span class="status {escape(run.status)}">{escape(run.status)}</span>',
        f"{'' if failed else escape(run.reason)}</p>",
        note("; ".join(_facts(run))),
        *(f'<p class="problem">{escape(text)}</p>' for text in problems),
    ]
    return f"<header>{''.join(lines)}</header>"


def _facts(run: RunData) -> list[str]:
    facts = []
    if run.counts["num_train"] is not None:
        facts.append(clip_counts(run.counts))
    if "size" in run.settings.get("model", {}):
        seconds = run.settings.get("data", {}).get("seconds")
        facts.append(f"model {run.settings['model']['size']}, crops of {seconds} s")
    if "seconds" in run.result:
        facts.append(f"took {duration(run.result['seconds'])}")
    return facts


def _results(run: RunData) -> str:
    """A row a stage, and one for the ensemble."""
    rows = [_result(stage) for stage in run.stages]
    ensemble = run.result.get("ensemble")
    if ensemble:
        rows.append(("ensemble", None, None, *(ensemble.get(name) for name in SCORES), None, None, None))
    if not rows:
        return section("Results", "<p>Nothing was logged yet.</p>")
    header = ("stage", "epochs", "loss", "accuracy", "mAP", "AUC", "d'", "clips/s", "wait %", "time")
    return section("Results", table(header, rows), _evaluated(run.last_evaluated))


def _result(stage: StageData) -> tuple[str | float | None, ...]:
    last = stage.lines[-1] if stage.lines else {}
    metrics, own = stage.metrics or {}, stage.summary
    return (
        stage.name if stage.done else f"{stage.name} (unfinished)",
        f"{last['epoch']:.4g}" if "epoch" in last else None,
        own.get("losses", {}).get("loss", last.get("loss")),
        *(metrics.get(name) for name in SCORES),
        f"{own['clips_per_second']:.1f}" if "clips_per_second" in own else None,
        f"{100 * own['wait']:.1f}" if "wait" in own else None,
        duration(own["seconds"]) if "seconds" in own else None,
    )


def _evaluated(stage: StageData | None) -> str:
    """On what, and which weights."""
    if stage is None:
        return ""
    metrics = stage.metrics
    text = f"Evaluated on {metrics['num_clips']} clips, {metrics['num_classes']} classes"
    if metrics["accuracy"] is not None:
        text += f"; chance is {1 / len(metrics['per_class']):.3f}"
    return note(f"{text}. Losses are means of the last epoch.") + _which_weights(metrics.get("weights") or {})


def _which_weights(kept: dict[str, object]) -> str:
    """What :class:`fastsskd.selection.Selection` noted, in words."""
    epochs = ", ".join(str(epoch) for epoch in kept.get("epochs", ()))
    words = {
        "last": "of the last epoch",
        "best": f"of epoch {epochs}, the best one on the evaluation set: the results are optimistic",
        "average": f"the mean of those after epochs {epochs}",
    }.get(kept.get("select"))
    average = f", as a moving average with decay {kept['ema']}" if kept.get("ema") else ""
    return note(f"Weights: {words}{average}.") if words else ""


def _compared(run: RunData, reference: Reference | None) -> str:
    """Whether the two runs can be compared."""
    if reference is None:
        return ""
    found = differences(reference, run)
    text = "The pale curves are the reference's. "
    if not found:
        return section("Reference", note(f"{text}Its settings, batch and number of clips are those of this run."))
    listed = table(("what differs",), [(what,) for what in found])
    return section("Reference", note(f"{text}These settings differ, so curves may too:"), listed)


def _stage(stage: StageData, reference: Sequence[dict[str, float]]) -> str:
    charts = stage_charts(stage, reference)
    shown = _spread(stage.pictures)
    parts = [f'<div class="charts">{"".join(charts)}</div>' if charts else ""]
    parts += [_picture(file, is_open=file == shown[-1]) for file in shown]
    if len(stage.pictures) > len(shown):
        parts.append(note(f"{len(stage.pictures)} pictures in all, in the folder plots/."))
    return section(stage.name, *parts)


def _spread(pictures: list[Path]) -> list[Path]:
    """At most ``MAX_PICTURES`` of them, evenly spread, the first and the last among them."""
    last = len(pictures) - 1
    if last < MAX_PICTURES:
        return pictures
    return [pictures[round(k * last / (MAX_PICTURES - 1))] for k in range(MAX_PICTURES)]


def _picture(file: Path, is_open: bool) -> str:
    _, _, epoch = file.stem.partition("-epoch")
    title = f"Masks, HOG weights and reconstructions {f'after epoch {int(epoch)}' if epoch else 'at the end'}"
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    image = f'<div class="wide"><img alt="{escape(title)}" src="data:image/png;base64,{data}"></div>'
    return details(title, image, is_open)


def _data(run: RunData) -> str:
    parts = []
    if run.skipped:
        reasons = Counter(run.skipped.values()).most_common(10)
        parts.append(f"<p>{len(run.skipped)} clip(s) could not be used and were left out.</p>")
        parts.append(table(("reason", "clips"), reasons))
        parts.append(details("The clips", table(("clip", "reason"), list(run.skipped.items())[:MAX_ROWS], (0, 1))))
        if len(run.skipped) > MAX_ROWS:
            parts.append(note(f"The first {MAX_ROWS}; all of them are in skipped.tsv."))
    if run.bad_steps:
        steps = {(line.get("stage"), line.get("step")) for line in run.bad_steps}
        parts.append(f"<p>{len(steps)} step(s) were skipped because a loss or a gradient was not finite.</p>")
        rows = [
            (line.get("stage"), line.get("step"), line.get("loss"), ", ".join(line.get("keys", ())))
            for line in run.bad_steps[:MAX_ROWS]
        ]
        parts.append(details("Their clips", table(("stage", "step", "loss", "clips"), rows, (0, 3))))
    return section("Data problems", *(parts or ["<p>None were found.</p>"]))


def _recipe(run: RunData) -> str:
    rows = [(name, json.dumps(value)) for name, value in run.changed.items()]
    parts = [table(("field", "value"), rows, (0, 1)) if rows else "<p>Every field has its default.</p>"]
    file = run.path / "config.toml"
    if file.exists():
        text = file.read_text(encoding="utf-8", errors="replace")
        parts.append(details("config.toml, every field", f"<pre>{escape(text)}</pre>"))
    if run.deepspeed:
        parts.append(details("ds_config.json", f"<pre>{escape(json.dumps(run.deepspeed, indent=1))}</pre>"))
    return section("Recipe: what differs from the defaults", *parts)


def _again(run: RunData) -> str:
    command = (
        f"deepspeed launch/train.py --ds_config {run.path}/ds_config.json --config {run.path}/config.toml \\\n"
        "    --set run.out=runs/again"
    )
    sizes = run.deepspeed
    own = sizes.get("train_micro_batch_size_per_gpu", 1) * sizes.get("gradient_accumulation_steps", 1)
    ranks = f", on {sizes['train_batch_size'] // max(own, 1)} rank(s) as before" if "train_batch_size" in sizes else ""
    facts = [("seed", run.settings.get("run", {}).get("seed")), *run.result.get("versions", {}).items()]
    facts += [(f"machine: {name}", value) for name, value in run.result.get("machine", {}).items()]
    return section(
        "How to run it again",
        f"<p>The same data, seed and versions give the same losses{ranks}.</p><pre>{escape(command)}</pre>",
        table(("what", "value"), [fact for fact in facts if fact[1] is not None], (0, 1)),
    )
