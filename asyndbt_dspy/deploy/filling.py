"""Put values into an exported prompt. Standard library only: this file may be copied into a service without this package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

try:
    from asyndbt_dspy.errors import ExportError
except ModuleNotFoundError:  # the file was copied

    class ExportError(ValueError):  # type: ignore[no-redef]
        """The messages cannot be filled. The message gives the reason."""


def fill_messages(entry: Mapping[str, Any], values: Mapping[str, str]) -> list[dict[str, str]]:
    """The messages of one entry of ``messages.json`` with its placeholders replaced.

    All placeholders are replaced in one pass, so that a value that looks like a placeholder stays as it is.

    Args:
        entry: ``{"messages": [{"role", "content"}], "placeholders": {input: placeholder}, "defaults": …}``.
        values: One string per input; inputs with a default may be left out.

    Raises:
        ExportError: a value is missing, too many, or no string, or the entry was refused when it was saved.
    """
    if "refused" in entry:
        raise ExportError(f"this predictor has no exact messages: {entry['refused']}")
    placeholders: Mapping[str, str] = entry["placeholders"]
    filled = {**entry.get("defaults", {}), **values}
    missing, unknown = sorted(set(placeholders) - set(filled)), sorted(set(filled) - set(placeholders))
    if missing or unknown:
        raise ExportError(f"inputs are {sorted(placeholders)}; missing: {missing}, unknown: {unknown}")
    for name, value in filled.items():
        if not isinstance(value, str):
            raise ExportError(
                f"input {name!r} is a {type(value).__name__}, not a string; "
                "write it as DSPy does first (asyndbt_dspy.deploy.format_inputs)"
            )
    if not placeholders:
        return [dict(message) for message in entry["messages"]]
    by_placeholder = {placeholder: filled[name] for name, placeholder in placeholders.items()}
    pattern = re.compile("|".join(re.escape(p) for p in sorted(by_placeholder, key=len, reverse=True)))
    *literal, last = entry["messages"]
    content = pattern.sub(lambda match: by_placeholder[match.group()], last["content"])
    return [*(dict(message) for message in literal), {**last, "content": content}]
