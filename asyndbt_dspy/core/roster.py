"""Who takes part and who has a step under way: bookkeeping whose cost does not grow with the number of workers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """What the server knows of a worker before the start.

    Attributes:
        name: Unique.
        allowed: Per upper-level block the arms this worker may draw (numbers, no texts).
        held_out: Number of its examples for the final race.
        step_calls: Rollouts of one of its steps; ``None``: draws times minibatch.
        group: Members of one group hold each other's race examples and take over from who is gone; "": nobody does.
        lm: Members of one group and one LM take each other's race examples whenever they have none of their own left.
    """

    name: str
    allowed: tuple[tuple[int, ...], ...]
    held_out: int = 0
    step_calls: int | None = None
    group: str = ""
    lm: str = ""


class Roster:
    """Workers by their numbers.

    Attributes:
        minibatch: Per worker, examples per draw of the step that it has under way or had last.
        living: Those that were not set aside, ascending.
        outstanding: Worker -> version of the step it has under way.
        repeats: Worker -> how many steps it began from the z of its newest request before that one.
        answers: Steps that living workers answered since ``count_anew``.
        idle: Those that an empty budget left without a request.
    """

    def __init__(self, count: int, minibatch: int) -> None:
        self.minibatch = [minibatch] * count
        self.living = list(range(count))
        self.outstanding: dict[int, int] = {}
        self.repeats: dict[int, int] = {}
        self.idle: set[int] = set()
        self.answers = 0
        self._answers: dict[int, int] = {}
        self._newest: dict[int, int] = {}
        self._sent_at: dict[int, int] = {}  # version -> steps under way that were sent with it

    def hand_out(self, number: int, version: int) -> None:
        """A step of this version is under way."""
        again = self._newest.get(number) == version
        self.repeats[number] = self.repeats[number] + 1 if again else 0
        self._newest[number] = version
        self.outstanding[number] = version
        self._sent_at[version] = self._sent_at.get(version, 0) + 1
        self.idle.discard(number)

    def take_back(self, number: int) -> bool:
        """The step of this worker was answered; returns whether one was under way."""
        self.answers += 1
        self._answers[number] = self._answers.get(number, 0) + 1
        return self._end(number)

    def count_anew(self) -> None:
        """Answers so far are used."""
        self.answers = 0
        self._answers.clear()

    def _end(self, number: int) -> bool:
        sent = self.outstanding.pop(number, None)
        if sent is None:
            return False
        self._sent_at[sent] -= 1
        if not self._sent_at[sent]:
            del self._sent_at[sent]
        return True

    def oldest(self, default: int) -> int:
        """Version of the oldest step under way, ``default`` if there is none."""
        return min(self._sent_at, default=default)

    def lose(self, number: int) -> bool:
        """Set a worker aside; returns whether it had a step under way."""
        self.living = [one for one in self.living if one != number]
        self.idle.discard(number)
        self.answers -= self._answers.pop(number, 0)
        return self._end(number)
