"""``prompt.md``: instructions and demos as a person reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def prompt_markdown(states: Mapping[str, Any]) -> str:
    """One section per predictor, from DSPy's states by predictor."""
    return "\n".join(_predictor(name, state) for name, state in states.items())


def _predictor(name: str, state: Mapping[str, Any]) -> str:
    demos = state["demos"]
    lines = [f"# {name}", "", "## Instructions", "", _fenced(state["signature"]["instructions"]), ""]
    lines += [f"## Demos ({len(demos)})", ""]
    for number, demo in enumerate(demos, start=1):
        origin = " (a run of the program)" if demo.get("augmented") else ""
        lines += [f"### {number}{origin}", ""]
        for field, value in demo.items():
            if field != "augmented":
                lines += [f"{field}:", "", _fenced(_text(value)), ""]
    return "\n".join(lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)


def _fenced(text: str) -> str:
    """``text`` in a code block whose fence is longer than any in the text, so that nothing in it is markup."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
