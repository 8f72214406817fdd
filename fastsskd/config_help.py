"""What the TOML's fields are, for people (`train.py --help`) and for editors (a JSON schema)."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any, get_type_hints

from fastsskd.config import Config

SCHEMA = "https://json-schema.org/draft/2020-12/schema"
WIDTH = 100
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def describe() -> str:
    """Every field by section, with its default, limits and meaning: the text below ``launch/train.py --help``."""
    defaults, lines = Config(), []
    for part in dataclasses.fields(Config):
        lines.append(f"[{part.name}]")
        section = getattr(defaults, part.name)
        for item in dataclasses.fields(section):
            lines.append(f"  {item.name} = {_shown(getattr(section, item.name))}{_limits(item.metadata)}")
            lines += textwrap.wrap(item.metadata["doc"], WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines)


def _limits(metadata: Any) -> str:
    """``(a | b)``, ``(0 to 1)``, ``(at least 1)`` or nothing."""
    low, high = metadata.get("low"), metadata.get("high")
    if "choices" in metadata:
        return f"   ({' | '.join(metadata['choices'])})"
    if low is not None and high is not None and high < 2**31:
        return f"   ({low:g} to {high:g})"
    return f"   (at least {low:g})" if low is not None else ""


def _shown(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def json_schema() -> dict[str, Any]:
    """A JSON schema of the TOML, draft 2020-12: types, limits, choices, defaults, meanings; no unknown keys.

    It says what holds of one field. What concerns two fields, :func:`fastsskd.config.load` checks.
    """
    defaults = Config()
    sections = {part.name: _section(getattr(defaults, part.name)) for part in dataclasses.fields(Config)}
    return {"$schema": SCHEMA, "title": "fastsskd", "type": "object", "additionalProperties": False} | {
        "properties": sections
    }


def _section(section: Any) -> dict[str, Any]:
    hints = get_type_hints(type(section))
    fields = {
        item.name: {
            **_type(hints[item.name], item.metadata),
            "default": _plain(getattr(section, item.name)),
            "description": item.metadata["doc"],
        }
        for item in dataclasses.fields(section)
    }
    return {"type": "object", "additionalProperties": False, "properties": fields}


def _type(hint: Any, metadata: Any) -> dict[str, Any]:
    if hint == str | tuple[str, ...]:
        return {"anyOf": [_type(str, metadata), _type(tuple[str, ...], metadata)]}
    if hint not in TYPES:
        return {"type": "array", "items": _type(hint.__args__[0], metadata)}
    limits = {"low": "minimum", "high": "maximum", "choices": "enum"}
    found = {name: _plain(metadata[key]) for key, name in limits.items() if metadata.get(key) is not None}
    return {"type": TYPES[hint], **found}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
