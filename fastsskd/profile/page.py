"""What `fastsskd profile` found as one page of HTML, pictures included."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastsskd import durable
from fastsskd.errors import InputError
from fastsskd.profile import report as profile_report
from fastsskd.profile.run import Profile
from fastsskd.profile.stats import number

DATA, COMPUTE, SENT, LINE = "#d1495b", "#30638e", "#edae49", "#222222"
_STEPS, _BINS = 80, 40  # that the pictures show
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.verdict { font-size: 1.15rem; padding: .8rem 1rem; background: #f2f5f8; border-left: 5px solid #30638e }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } img { max-width: 100%; height: auto }
code { background: #f2f5f8; padding: 0 .2rem; overflow-wrap: anywhere } .small { color: #666; font-size: .85rem }
"""


def write(result: Profile, path: Path) -> None:
    """Write the page; nothing in it is fetched from elsewhere.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        durable.write_text(path, page(result))
    except OSError as error:
        raise InputError(f"--html {path}: {error.strerror}; choose another file") from None


def page(result: Profile) -> str:
    body = [f"<h1>Profile of {html.escape(result.kind)}</h1>"]
    body.append(f'<p class="verdict">{html.escape(result.verdict.line)}</p>')
    body.append(f"<p>{html.escape(profile_report.summary(result))}</p>")
    body += ["<h2>The four runs</h2>", _runs(result)]
    body += ["<h2>What would help</h2>", _advice(result)]
    for title, says, draw in _PICTURES:
        body.append(f'<h2>{title}</h2><p>{says}</p><img alt="{title}" src="{_picture(draw, result)}">')
    body += ["<h2>Stages</h2>", _stages(result)]
    body += ["<h2>Waiting</h2>", _waiting(result)]
    body += ["<h2>Machine</h2>", *(f"<p>{html.escape(line)}</p>" for line in profile_report.machine_lines(result))]
    body.append(f'<p class="small">{html.escape(profile_report.stamp(result))}</p>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>fastsskd profile: {html.escape(result.verdict.word)}</title><style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _runs(result: Profile) -> str:
    rows = [
        [profile_report.RUNS[name], number(rate.value), f"{number(rate.low)} to {number(rate.high)}"]
        for name, rate in profile_report.rates(result.found).items()
    ]
    return _table(["", "clips/s", "95 % of the medians"], rows)


def _advice(result: Profile) -> str:
    if not result.advice:
        return "<p>Nothing here would gain 3 %.</p>"
    items = []
    for one in result.advice:
        gain = "depends on the choice" if one.gain is None else f"predicted x {one.gain:.2f}"
        if one.tried is not None:
            gain += f", tried x {one.tried.value:.2f}"
        text, how = html.escape(one.text), html.escape(one.how)
        items.append(f"<li><b>{one.key}</b>: {text}; {gain}<br><code>{how}</code></li>")
    return f"<ol>{''.join(items)}</ol>"


def _stages(result: Profile) -> str:
    found, rows = result.found, []
    for stage in found.stages:
        whole = found.group(stage.group)
        share = f"{100 * stage.seconds / whole:.1f} %" if whole else "-"
        cost = [f"{1e3 * stage.seconds:.3f}", f"{1e3 * stage.cpu:.2f}", profile_report.real_time(found, stage), share]
        rows.append([f"{stage.group}: {stage.name}", number(stage.up_to), *cost])
    return _table(["", "clips/s", "+ms/clip", "CPU s/1000 clips", "x real time", "share"], rows)


def _waiting(result: Profile) -> str:
    rows = []
    for place, rank in enumerate(result.found.ranks):
        w = rank.waits
        points = [f"{1e3 * value:.1f}" for value in (w.p50, w.p95, w.p99, w.max)]
        rows.append([str(place), *points, f"{100 * w.ready:.0f} %", f"{100 * w.share:.1f} %", f"{rank.first:.2f} s"])
    return _table(["rank", "p50 ms", "p95", "p99", "max", "ready", "waiting", "first batch"], rows)


def _picture(draw: Callable[[Profile, Any], None], result: Profile) -> str:
    """A drawing as an address that holds it."""
    figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
    draw(result, axis)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def waterfall(result: Profile, axis: Any) -> None:
    """Clips a second of the loader's pipelines that end ever later, beside what the step could take."""
    found = result.found
    names = [stage.name for stage in found.stages if stage.group == "loader"]
    rates = [stage.up_to for stage in found.stages if stage.group == "loader"]
    names, rates = [*(f"… {name}" for name in names), "loader"], [*rates, found.loader.value]
    axis.barh(names, rates, color=[COMPUTE] * (len(names) - 1) + [DATA])
    axis.invert_yaxis()
    axis.axvline(found.step.value, color=LINE, ls="--", label=f"the step could take {found.step.value:.0f}")
    axis.axvline(found.end_to_end.value, color=SENT, label=f"end to end {found.end_to_end.value:.0f}")
    axis.set(xscale="log", xlabel="clips/s", xlim=(0.5 * min([*rates, found.end_to_end.value]), 2.5 * max(rates)))
    for place, rate in enumerate(rates):
        axis.text(rate, place, f" {number(rate)}", va="center", fontsize=8)
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)


def threads(result: Profile, axis: Any) -> None:
    found = result.found
    counts, rates = list(found.threads), [pace.clips_per_second for pace in found.threads.values()]
    axis.plot(counts, rates, "o-", color=COMPUTE)
    axis.axhline(found.step.value / len(found.ranks), color=LINE, ls="--", label="the step could take (one rank)")
    axis.axvline(found.workers, color=DATA, lw=1, label=f"now {found.workers}")
    axis.set(xlabel="threads of a rank's loader", ylabel="clips/s", xticks=counts, ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)


def timeline(result: Profile, axis: Any) -> None:
    """The last steps of rank 0."""
    steps = result.traces[0]["end_to_end"].steps[-_STEPS:]
    wait, rest = (np.array([step[i] for step in steps]) * 1e3 for i in (1, 2))
    sent = np.minimum(rest, 1e3 * result.found.communication * max(rank.step for rank in result.found.ranks))
    place = np.arange(len(steps))
    axis.bar(place, wait, 1.0, color=DATA, label="waiting for data")
    axis.bar(place, rest - sent, 1.0, bottom=wait, color=COMPUTE, label="computing")
    if sent.any():
        axis.bar(place, sent, 1.0, bottom=wait + rest - sent, color=SENT, label="communication (mean)")
    axis.set(xlabel=f"the last {len(steps)} steps end to end", ylabel="ms", xticks=[])
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)


def readiness(result: Profile, axis: Any) -> None:
    """Share of the batches that were ready, by rank and along the steps."""
    waits = [[wait for _, wait, _ in trace["end_to_end"].steps] for trace in result.traces]
    bins = max(min(_BINS, min(map(len, waits))), 1)
    limits = [rank.waits.limit for rank in result.found.ranks]
    shares = [
        [np.mean(part <= limit) for part in np.array_split(np.array(own), bins)]
        for own, limit in zip(waits, limits, strict=True)
    ]
    image = axis.imshow(
        100 * np.array(shares), aspect="auto", vmin=0, vmax=100, cmap="RdYlGn", extent=(0, 100, -0.5, len(shares) - 0.5)
    )
    axis.set(xlabel="% of the steps end to end", ylabel="rank", yticks=range(len(shares)))
    axis.figure.set_figheight(min(1.4 + 0.2 * len(shares), 5.0))
    axis.figure.colorbar(image, ax=axis, label="% ready", pad=0.01)


def formats(result: Profile, axis: Any) -> None:
    names = [f"{kind} ({count})" for kind, (count, _) in result.formats.items()]
    rates = [pace.clips_per_second for _, pace in result.formats.values()]
    axis.bar(names, rates, 0.5, color=COMPUTE)
    axis.set(ylabel="clips/s", xlim=(-1, max(len(names), 3)))
    for place, rate in enumerate(rates):
        axis.text(place, rate, number(rate), ha="center", va="bottom", fontsize=8)


_PICTURES = (
    (
        "Where the loader's speed goes",
        "Each bar is a pipeline that ends one stage later; the dashed line is what the step could take.",
        waterfall,
    ),
    ("Threads", "The whole pipeline with other numbers of threads, nothing else running.", threads),
    ("Steps", "What each step of rank 0 spent its time on.", timeline),
    ("Readiness", "Green: the batch was there when the step asked for it (within 1 ms, or 1 % of a step).", readiness),
    ("Formats", "The whole pipeline on each kind of file; in brackets, clips of the sample.", formats),
)
