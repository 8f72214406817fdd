"""A run's report as one HTML page that needs nothing else: no script, no link, pictures and curves inside."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from fastsskd.report_charts import confusion
from fastsskd.report_curves import stage_charts
from fastsskd.report_data import RunData, StageData, by_class, confused, duration, hardest

MAX_PICTURES = 4
"""Of a stage; the rest stay in the run's folder."""
FOLDED = 24
"""Classes from which their table shows the worst and the best alone, and the rest when it is opened."""
MAX_ROWS = 200

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 1rem; background: #f6f7f9; color: #1c2024;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 0.6rem; }
h3 { font-size: 1rem; margin: 1rem 0 0.4rem; }
section { background: #fff; border: 1px solid #dfe2e7; border-radius: 8px; padding: 1rem; margin: 0 0 1rem; }
p { margin: 0.3rem 0; overflow-wrap: anywhere; }
.status { display: inline-block; border-radius: 4px; padding: 0 0.5rem; color: #fff; background: #5b616b; }
.complete { background: #1f7a44; } .failed { background: #b3261e; } .stopped, .unfinished { background: #8a5a00; }
.problem { border-left: 4px solid #b3261e; background: #fdf0ef; padding: 0.4rem 0.7rem; margin: 0.4rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 1rem; }
.chart { margin: 0; min-width: 0; } .chart figcaption { font-weight: 600; font-size: 0.9rem; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: #3c424b; }
svg .grid { stroke: #e6e8ec; } svg .axis { stroke: #8a8f98; }
.legend { display: flex; flex-wrap: wrap; gap: 0 0.8rem; margin: 0; font-size: 0.8rem; color: #3c424b; }
.legend span { display: inline-flex; align-items: center; gap: 0.3rem; } .legend svg { width: 22px; height: 8px; }
.wide { overflow-x: auto; max-width: 100%; } svg.matrix { max-width: none; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #e6e8ec; white-space: nowrap; }
th { color: #5b616b; font-weight: 600; } th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 1rem; }
.columns > div { min-width: 0; }
details { margin: 0.5rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: #f1f3f6; padding: 0.6rem; border-radius: 6px; font-size: 0.82rem; }
img { width: 100%; min-width: 640px; max-width: 1300px; height: auto; display: block; }
.note { color: #5b616b; font-size: 0.88rem; }
@media (max-width: 600px) {
  body { padding: 0.5rem; } section { padding: 0.7rem; }
  table { font-size: 0.8rem; } th, td { padding: 0.15rem 0.35rem; }
}
"""


def page(run: RunData) -> str:
    """The whole page."""
    title = f"{run.path.resolve().name}: fastsskd run"
    body = [
        _head(run),
        _results(run),
        *(_stage(stage) for stage in run.stages),
        _classes(run),
        _mistakes(run),
        _data(run),
        _recipe(run),
        _again(run),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _section(title: str, *parts: str) -> str:
    inside = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{inside}</section>" if inside else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], text: Sequence[int] = (0,)) -> str:
    """``text``: columns that hold words, not numbers."""

    def row(tag: str, cells: Sequence[Any]) -> str:
        marked = (f"<{tag}{' class=text' if i in text else ''}>{_cell(c)}</{tag}>" for i, c in enumerate(cells))
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return f'<div class="wide"><table><thead>{row("th", header)}</thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def _details(title: str, inside: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>\n{inside}</details>"


def _head(run: RunData) -> str:
    clips = f"{run.num_train} clips to train on, {run.num_eval} to evaluate on" if run.num_train is not None else ""
    seconds = run.result.get("seconds")
    facts = [clips, f"took {duration(seconds)}" if seconds else "", _model(run)]
    problems = [f"{stage.name}, step {step}: {text}" for stage in run.stages for step, text in stage.problems] + [
        f"cannot be read: {text}" for text in run.unreadable
    ]
    if run.status == "failed":
        problems.insert(0, f"the run failed: {run.reason}")
    reason = f" {escape(run.reason)}" if run.reason and run.status != "failed" else ""
    return (
        f"<header><h1>{escape(str(run.path))}</h1>"
        f'<p><span class="status {escape(run.status)}">{escape(run.status)}</span>{reason}</p>'
        f'<p class="note">{escape("; ".join(fact for fact in facts if fact))}</p>'
        + "".join(f'<p class="problem">{escape(text)}</p>' for text in problems)
        + "</header>"
    )


def _model(run: RunData) -> str:
    model, data = run.settings.get("model", {}), run.settings.get("data", {})
    return f"model {model['size']}, crops of {data.get('seconds')} s" if "size" in model else ""


def _results(run: RunData) -> str:
    header = ("stage", "epochs", "loss", "accuracy", "mAP", "AUC", "d'", "clips/s", "wait %", "time")
    rows = []
    for stage in run.stages:
        metrics, own = stage.metrics or {}, stage.summary
        loss = own.get("losses", {}).get("loss", stage.lines[-1].get("loss") if stage.lines else None)
        epochs = f"{stage.lines[-1]['epoch']:.4g}" if stage.lines else None
        speed = f"{own['clips_per_second']:.1f}" if "clips_per_second" in own else None
        wait = f"{100 * own['wait']:.1f}" if "wait" in own else None
        took = duration(own["seconds"]) if "seconds" in own else None
        scores = [metrics.get(name) for name in ("accuracy", "mAP", "AUC", "d_prime")]
        rows.append(
            (stage.name if stage.done else f"{stage.name} (unfinished)", epochs, loss, *scores, speed, wait, took)
        )
    ensemble = run.result.get("ensemble")
    if ensemble:
        scores = [ensemble.get(name) for name in ("accuracy", "mAP", "AUC", "d_prime")]
        rows.append(("ensemble", None, None, *scores, None, None, None))
    last = run.last_evaluated
    kept = _which_weights(last)
    return _section("Results", _table(header, rows) if rows else "<p>Nothing was logged yet.</p>", _chance(last), kept)


def _chance(stage: StageData | None) -> str:
    if stage is None:
        return ""
    clips = f"Evaluated on {stage.metrics['num_clips']} clips, {stage.metrics['num_classes']} classes"
    chance = f"; chance is {1 / len(stage.metrics['per_class']):.3f}" if stage.metrics["accuracy"] is not None else ""
    return f'<p class="note">{clips}{chance}. Losses are means of the last epoch.</p>'


def _which_weights(stage: StageData | None) -> str:
    """Which epochs the weights are of, and whether the evaluation set chose them."""
    note = (stage.metrics or {}).get("weights") if stage else None
    if not note:
        return ""
    epochs = ", ".join(str(epoch) for epoch in note.get("epochs", ()))
    kept = {
        "last": "of the last epoch",
        "best": f"of epoch {epochs}, the best one on the evaluation set: the results are optimistic",
        "average": f"the mean of those after epochs {epochs}",
    }.get(note.get("select"), json.dumps(note))
    average = f"; a moving average, decay {note['ema']}" if note.get("ema") else ""
    return f'<p class="note">Weights: {escape(kept + average)}.</p>'


def _stage(stage: StageData) -> str:
    charts = stage_charts(stage)
    pictures = stage.pictures
    if len(pictures) > MAX_PICTURES:  # evenly spread, the last among them
        last = len(pictures) - 1
        pictures = [pictures[round(k * last / (MAX_PICTURES - 1))] for k in range(MAX_PICTURES)]
    shown = []
    for file in pictures:
        epoch = file.stem.rpartition("-epoch")[2].lstrip("0") if "-epoch" in file.stem else ""
        title = (
            f"Masks, HOG weights and reconstructions after epoch {epoch}"
            if epoch
            else ("Masks, HOG weights and reconstructions at the end")
        )
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        image = f'<div class="wide"><img alt="{escape(title)}" src="data:image/png;base64,{data}"></div>'
        shown.append(_details(title, image, is_open=file == pictures[-1]))
    if len(stage.pictures) > len(pictures):
        shown.append(f'<p class="note">{len(stage.pictures)} pictures in all, in the folder plots/.</p>')
    grid = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    return _section(stage.name, grid, *shown)


def _classes(run: RunData) -> str:
    stage = run.last_evaluated
    if stage is None:
        return ""
    columns = [name for name in ("AP", "AUC", "accuracy") if any(name in row for _, row in by_class(stage.metrics))]
    header = ("class", "clips", *columns)
    rows = [(name, row["num_clips"], *(row.get(column) for column in columns)) for name, row in by_class(stage.metrics)]
    if len(rows) <= FOLDED:
        inside = _table(header, rows)
    else:
        best = [row for row in rows if row[2] is not None][-10:][::-1]
        inside = (
            f'<div class="columns"><div><h3>Worst</h3>{_table(header, rows[:10])}</div>'
            f"<div><h3>Best</h3>{_table(header, best)}</div></div>"
            + _details(f"All {len(rows)} classes", _table(header, rows))
        )
    return _section(f"Classes, {stage.name}", '<p class="note">Worst average precision first.</p>', inside)


def _mistakes(run: RunData) -> str:
    stage = run.last_evaluated
    if stage is None or stage.scores is None:
        return ""
    found, parts = confused(stage.scores), []
    if found:
        matrix, pairs = found
        if len(matrix) <= 60:
            parts.append('<p class="note">A row for each true class, a column for what its clips were taken for.</p>')
            parts.append(confusion(matrix, stage.scores.classes))
        rows = [(p["true"], p["taken_for"], p["clips"], f"{100 * p['share']:.0f}") for p in pairs]
        header = ("true class", "taken for", "clips", "% of the class")
        parts.append(_details("Classes most often confused", _table(header, rows, (0, 1)), True) if rows else "")
    rows = [
        (clip["key"], ", ".join(clip["labels"]), clip["prob"], clip["guessed"], clip["guessed_prob"])
        for clip in hardest(stage.scores)
    ]
    header = ("clip", "labels", "their probability", "likeliest class", "its probability")
    parts.append(_details("Hardest clips", _table(header, rows, (0, 1, 3)), True))
    return _section(f"Mistakes, {stage.name}", *parts)


def _data(run: RunData) -> str:
    parts = []
    if run.skipped:
        kinds = Counter(run.skipped.values()).most_common(10)
        parts.append(f"<p>{len(run.skipped)} clip(s) could not be used and were left out.</p>")
        parts.append(_table(("reason", "clips"), kinds))
        parts.append(_details("The clips", _table(("clip", "reason"), list(run.skipped.items())[:MAX_ROWS], (0, 1))))
        if len(run.skipped) > MAX_ROWS:
            parts.append(f'<p class="note">The first {MAX_ROWS}; all of them are in skipped.tsv.</p>')
    if run.bad_steps:
        steps = {(line.get("stage"), line.get("step")) for line in run.bad_steps}
        parts.append(f"<p>{len(steps)} step(s) were skipped because a loss or gradient was not finite.</p>")
        rows = [
            (b.get("stage"), b.get("step"), b.get("loss"), ", ".join(b.get("keys", ())))
            for b in run.bad_steps[:MAX_ROWS]
        ]
        parts.append(_details("Their clips", _table(("stage", "step", "loss", "clips"), rows, (0, 3))))
    return _section("Data problems", *(parts or ["<p>None were found.</p>"]))


def _recipe(run: RunData) -> str:
    rows = [(name, json.dumps(value)) for name, value in run.changed.items()]
    parts = [_table(("field", "value"), rows, (0, 1)) if rows else "<p>Every field has its default.</p>"]
    file = run.path / "config.toml"
    if file.exists():
        text = file.read_text(encoding="utf-8", errors="replace")
        parts.append(_details("config.toml, every field", f"<pre>{escape(text)}</pre>"))
    if run.deepspeed:
        parts.append(_details("ds_config.json", f"<pre>{escape(json.dumps(run.deepspeed, indent=1))}</pre>"))
    return _section("Recipe: what differs from the defaults", *parts)


def _again(run: RunData) -> str:
    command = (
        f"deepspeed launch/train.py --ds_config {run.path}/ds_config.json --config {run.path}/config.toml \\\n"
        "    --set run.out=runs/again"
    )
    sizes = run.deepspeed
    micro = sizes.get("train_micro_batch_size_per_gpu", 1) * sizes.get("gradient_accumulation_steps", 1)
    ranks = f" on {sizes['train_batch_size'] // max(micro, 1)} rank(s)" if "train_batch_size" in sizes else ""
    versions = run.result.get("versions", {})
    machine = run.result.get("machine", {})
    facts = [("seed", run.settings.get("run", {}).get("seed")), *versions.items()]
    facts += [(f"machine: {name}", value) for name, value in machine.items()]
    return _section(
        "How to run it again",
        f"<p>The same data, seed and versions give the same losses{ranks}.</p><pre>{escape(command)}</pre>",
        _table(("what", "value"), [fact for fact in facts if fact[1] is not None], (0, 1)),
    )
