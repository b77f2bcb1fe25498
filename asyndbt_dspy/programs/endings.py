"""Demos that end like the turn that is to be answered.

DSPy's adapters end the last turn with a reminder of the format ("Respond with a JSON object in the following order of
fields: …") that the turns of demos do not have. A small LM then no longer sees the demos as answers to turns like the one
it is asked: with Gemma 3 270M, three sets of four demos classified 50 % of sst2 so, and 65 to 85 % with the reminder in
the demos too (``benchmarks/demo_endings.py``). So that is a choice of its own. It lives in the demos alone: what is
deployed is a plain DSPy program. Adapters that close a field behind its text (XML) leave no place for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy

from asyndbt_dspy.programs.program_space import DemoEnding, DemoItem

_ANY_TEXTS = ("one text", "and quite another")


def demo_endings(student: dspy.Module, items: Sequence[DemoItem]) -> dict[str, DemoEnding]:
    """Per predictor with demos, how its demos would have to end; without the predictors whose last turn adds nothing.

    Read off what the surrounding adapter (``dspy.settings.adapter``) makes of a demo.
    """
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    found: dict[str, DemoEnding] = {}
    for name, predictor in student.named_predictors():
        demo = next((item.demo for item in items if item.predictor == name), None)
        ending = None if demo is None else _ending(adapter, predictor.signature, demo)
        if ending is not None:
            found[name] = ending
    return found


def _ending(adapter: Any, signature: Any, demo: dspy.Example) -> DemoEnding | None:
    """What ``adapter`` adds to the last turn, where adding it to a demo's last input makes the two turns equal."""
    last = next(reversed(signature.input_fields), None)
    if last is None or not isinstance(demo.get(last), str):
        return None
    # Whatever the example says: what is added must be the adapter's own words, the same for any text.
    found = [_added(adapter, signature, demo, last, text) for text in _ANY_TEXTS]
    if found[0] is None or found[0] != found[1]:
        return None
    return DemoEnding(last, found[0])


def _added(adapter: Any, signature: Any, demo: dspy.Example, last: str, text: str) -> str | None:
    inputs = {
        name: text if isinstance(demo[name], str) else demo[name]
        for name in signature.input_fields
        if name in demo
    }
    # A demo without all outputs gets a preface; how turns end does not depend on what they say.
    whole = {**dict.fromkeys(signature.output_fields, text), **dict(demo), **inputs}
    shown, asked = _turns(adapter, signature, whole, inputs)
    if not asked.startswith(shown) or asked == shown:
        return None
    added = asked[len(shown) :]
    changed = {**whole, last: text + added}
    return added if _turns(adapter, signature, changed, inputs) == (asked, asked) else None


def _turns(adapter: Any, signature: Any, demo: dict[str, Any], inputs: dict[str, Any]) -> tuple[str, str]:
    """The user's turn of a demo, and the last one; empty where an adapter has no such turns."""
    messages = adapter.format(signature, [demo], inputs)
    texts = [message["content"] for message in messages if message["role"] == "user"]
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        return "", ""
    return texts[-2], texts[-1]
