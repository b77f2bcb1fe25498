"""What the LM calls of a rollout used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dspy
from dspy.utils.usage_tracker import UsageTracker


class SharedTracker(UsageTracker):
    """One tracker for all threads of a rollout: ``dspy.Parallel`` deep-copies its caller's for each of its own, and drops them.

    A call of which no usage is reported is a call all the same; DSPy's own tracker leaves it out.
    """

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        """Note one call."""
        self.usage_data[lm].append(self._flatten_usage_entry(usage_entry))

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedTracker:
        return self


@contextmanager
def tracking_usage() -> Iterator[SharedTracker]:
    """Hear of what the LM calls inside the block use, and those in threads that DSPy starts from it.

    A tracker around the block is told at its end, as by ``dspy.track_usage``.
    """
    tracker, around = SharedTracker(), dspy.settings.usage_tracker
    with dspy.context(usage_tracker=tracker):
        try:
            yield tracker
        finally:
            if around is not None:
                for lm, entries in list(tracker.usage_data.items()):
                    around.usage_data[lm].extend(entries)


def usage_of(tracker: UsageTracker) -> tuple[int, int, int]:
    """LM calls, prompt tokens, completion tokens; of threads that go on (``dspy.Parallel`` gave them up), what they used so far."""
    entries = [entry for found in list(tracker.usage_data.values()) for entry in list(found)]
    prompt = sum(int(entry.get("prompt_tokens") or 0) for entry in entries)
    completion = sum(int(entry.get("completion_tokens") or 0) for entry in entries)
    return len(entries), prompt, completion
