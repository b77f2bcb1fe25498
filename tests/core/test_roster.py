"""Who has a step under way, and how many were answered."""

from __future__ import annotations

from asyndbt_dspy.core.roster import Roster


def test_answers_are_counted_per_living_worker() -> None:
    roster = Roster(3, 6)
    for number in (0, 1, 1, 2):
        roster.hand_out(number, 0)
        assert roster.take_back(number)
    assert roster.answers == 4
    roster.hand_out(2, 0)
    assert roster.lose(1) is False, "it had none under way, and its two answers are nobody's"
    assert roster.answers == 2
    assert roster.lose(2) is True, "a step that nobody will answer is no answer"
    assert roster.answers == 1
    roster.count_anew()
    assert roster.answers == 0
    assert roster.oldest(7) == 7
