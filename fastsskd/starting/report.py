"""What became of each weight when a model was started from a file: shown in groups, written down one by one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

FATES = ("loaded", "resized", "ignored", "missing")
"""Taken as it is; taken with other values; of the file and not used; of the model, and fresh."""


@dataclass(frozen=True)
class Weight:
    """One weight of the model, or what is ignored of the file.

    Attributes:
        fate: one of :data:`FATES`.
        name: in the model; of what is ignored, in the file.
        sources: names in the file; empty where it is missing.
        note: how it was resized, or why it is ignored.
    """

    fate: str
    name: str
    sources: tuple[str, ...] = ()
    note: str = ""


@dataclass
class StartReport:
    """Every name in the file and in the model.

    Attributes:
        source: the file's model, in words.
        weights: in the order of the file, then what it lacks.
    """

    source: str
    weights: list[Weight] = field(default_factory=list)

    def add(self, fate: str, name: str, sources: tuple[str, ...] = (), note: str = "") -> None:
        self.weights.append(Weight(fate, name, sources, note))

    def names(self, fate: str) -> list[str]:
        """Names of the weights with that fate."""
        return [weight.name for weight in self.weights if weight.fate == fate]

    def lines(self) -> list[str]:
        """For people: the source and the counts, then what is behind them where not all was loaded."""
        counts = Counter(weight.fate for weight in self.weights)
        lines = [f"{self.source}: " + ", ".join(f"{counts[fate]} {fate}" for fate in FATES)]
        if counts.total() > counts["loaded"]:
            lines += [f"  {fate} {counts[fate]}: {self._groups(fate)}" for fate in FATES if counts[fate]]
        return lines

    def _groups(self, fate: str) -> str:
        """``mae.* (40)``: names that begin alike and share a note as one."""
        groups: dict[tuple[str, str], list[str]] = {}
        for weight in self.weights:
            if weight.fate == fate:
                first = weight.name.replace("/", ".").split(".")[0]
                groups.setdefault((first, weight.note), []).append(weight.name)
        parts = []
        for (first, note), names in groups.items():
            about = "; ".join(part for part in (str(len(names)) if len(names) > 1 else "", note) if part)
            parts.append((f"{first}.*" if len(names) > 1 else names[0]) + (f" ({about})" if about else ""))
        return ", ".join(parts)

    def table(self) -> str:
        """Tab-separated, a line for each weight: fate, name, names in the file, note."""
        rows = [("fate", "weight", "in_the_file", "note")]
        rows += [(weight.fate, weight.name, " ".join(weight.sources), weight.note) for weight in self.weights]
        return "".join("\t".join(row) + "\n" for row in rows)
