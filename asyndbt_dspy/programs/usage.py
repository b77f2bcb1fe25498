"""What the LM calls of a rollout used."""

from __future__ import annotations

from dspy.utils.usage_tracker import UsageTracker


def usage_of(tracker: UsageTracker) -> tuple[int, int, int]:
    """LM calls, prompt tokens, completion tokens."""
    entries = [entry for found in tracker.usage_data.values() for entry in found]
    prompt = sum(int(entry.get("prompt_tokens") or 0) for entry in entries)
    completion = sum(int(entry.get("completion_tokens") or 0) for entry in entries)
    return len(entries), prompt, completion
