"""Instructions that the proposer writes during the search, from what the best candidates got wrong.

The arms are there from the start, without a text and drawn by nobody (``core.late_arms``). A third of the search's rollouts or
seconds in, by whichever bound comes first, the proposer is shown the best candidate so far in place of the student, with its
failures and those of the next best. What it writes joins and is tried like any arm. Nobody waits for it, unless the run is to
be repeatable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import dspy

from asyndbt_dspy.core.messages import ArmsJoined, Evaluate, Scored
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.space import Candidate
from asyndbt_dspy.engines.protocols import Evaluator, Recorded
from asyndbt_dspy.errors import BudgetExceededError
from asyndbt_dspy.preparation import SearchSpaceOptions, TextBook
from asyndbt_dspy.programs import proposals
from asyndbt_dspy.programs.evaluator import CacheKey, ProgramEvaluator
from asyndbt_dspy.programs.program_space import ProgramSpace
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.sharding import Shard

logger = logging.getLogger(__name__)

ASKED_AFTER = 1 / 3
"""Part of the search's rollouts, or seconds, after which the proposer is asked. What is under way then goes on without its texts,
in a small budget another third. Where the student is all there is to try, the proposer is asked after the first answers."""
_UNBOUNDED = 500
"""Rollouts in place of that part where nothing bounds them."""
_BEST = 4
"""Candidates whose failures are shown."""


class LaterInstructions:
    """One run's; ``between`` is for a ``ListeningEngine``, ``observe`` an observer of its events.

    Args:
        options: With the proposer, metered.
        waits: Whether the run stands still while the proposer writes, so that timing decides nothing.
        affordable: Rollouts of the search that the caps on calls, tokens and dollars pay for; 0 or less: they bound none.
        is_late: Whether a part of the search's time is over; then it is not waited for a part of its rollouts.
        book: What was written for an earlier process of the run is not asked for again.
    """

    def __init__(
        self,
        programs: ProgramSpace,
        server: ServerState,
        shards: Sequence[Shard],
        options: SearchSpaceOptions,
        seed: int,
        book: TextBook,
        *,
        waits: bool,
        affordable: float = 0.0,
        is_late: Callable[[], bool] = lambda: False,
    ) -> None:
        self._programs = programs
        self._server = server
        # What private workers saw is shown to nobody.
        self._public = {shard.worker.name: shard for shard in shards if shard.worker.share_demos}
        self._options = options
        self._seed = seed
        self._book = book
        self._waits = waits
        bounds = [
            one for one in (server.calls_left, affordable if affordable > 0 else None) if one is not None
        ]
        self._after = int(min(bounds) * ASKED_AFTER) if bounds else _UNBOUNDED
        if not any(server.space.has_choice(member.allowed, late=False) for member in server.members):
            self._after = 1  # there is nothing else to try, and the search would be over before a third of it
        self._is_late = is_late
        self._blocks = {
            number: block.predictor for number, block in enumerate(programs.space.lower) if block.late
        }
        self._answers: dict[CacheKey, Rollout] = {}
        self._requests: dict[tuple[str, int], Evaluate] = {}
        self._failures: dict[Candidate, list[tuple[dspy.Example, Rollout]]] = {}
        self._task: asyncio.Task[dict[int, list[str]]] | None = None
        self._is_over = not self._blocks

    def watched(self, evaluator: ProgramEvaluator) -> Evaluator:
        """``evaluator``, with what it finds noted here."""
        if self._is_over:
            return evaluator
        evaluator.on_answer = self._note
        return _Watched(evaluator, self._requests)

    def fill_known(self) -> None:
        """Texts of an earlier process, which its recorded events may speak of."""
        for number, predictor in self._blocks.items():
            self._fill(number, self._book.texts(_name(predictor)) or ())

    def _note(self, key: CacheKey, rollout: Rollout) -> None:
        _, worker, held_out, _ = key
        if not self._is_over and not held_out and worker in self._public:
            self._answers[key] = rollout

    def observe(self, recorded: Recorded) -> None:
        """Failures count once the run has taken them: what is under way depends on timing."""
        event = recorded.event
        if self._is_over or not isinstance(event, Scored):
            return
        request = self._requests.pop((event.worker, event.task), None)
        if request is None or request.held_out or event.worker not in self._public:
            return
        examples = self._public[event.worker].estimate
        for candidate, numbers in zip(request.candidates, request.examples, strict=True):
            for number in numbers:
                rollout = self._answers.pop((candidate, event.worker, False, number), None)
                if rollout is not None and rollout.score is not None and rollout.score < 1.0:
                    self._failures.setdefault(candidate, []).append((examples[number], rollout))

    async def between(self) -> ArmsJoined | None:
        """What joined, once; see ``ListeningEngine``."""
        server = self._server
        if self._is_over:
            return None
        is_due = server.calls_spent >= self._after or server.has_nothing_new or self._is_late()
        if self._task is None and not is_due:
            return None
        if server.phase == "race" or server.arms.said:  # too late, or an earlier process of the run did it
            await self.close()
            return None
        if self._task is None:
            self._task = asyncio.ensure_future(self._propose())
        if self._waits:
            await asyncio.wait({self._task})
        if self._is_over or not self._task.done():  # closed meanwhile, or not written yet
            return None
        texts = self._task.result()
        await self.close()
        # Also where nothing was written: then nothing is awaited any more, and a search that knows all may end.
        now = list(server.arms.open)
        for number, found in texts.items():
            self._fill(number, found)
            now[number] += len(found)
        return ArmsJoined(tuple(now))

    async def close(self) -> None:
        """Nothing joins from now on."""
        self._is_over = True
        self._answers.clear()
        self._requests.clear()
        self._failures.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _fill(self, number: int, texts: Sequence[str]) -> None:
        block = self._programs.space.blocks[number]
        for place, text in enumerate(texts):
            self._programs.fill(number, len(block.arms) - block.late + place, text)

    async def _propose(self) -> dict[int, list[str]]:
        best = self._server.finalists()[:_BEST]
        failures = [one for candidate in best for one in self._failures.get(candidate, ())]
        if not failures:
            failures = [one for found in self._failures.values() for one in found]
        program = self._programs.build(best[0] if best else self._programs.space.student, fresh=True)
        asked = [
            self._ask(program, number, predictor, failures) for number, predictor in self._blocks.items()
        ]
        try:
            return dict(zip(self._blocks, await asyncio.gather(*asked), strict=True))
        except BudgetExceededError as error:
            logger.info("no further instructions are proposed: %s", error)
            return {}

    async def _ask(
        self,
        program: dspy.Module,
        number: int,
        predictor: str,
        failures: Sequence[tuple[dspy.Example, Rollout]],
    ) -> list[str]:
        written = self._book.texts(_name(predictor))
        if written is not None:
            return written
        block, options = self._programs.space.blocks[number], self._options
        arms = (self._programs.arm_text(number, arm) for arm in range(len(block.arms) - block.late))
        found = await proposals.propose_instructions(
            program,
            predictor,
            lm=options.proposer,
            examples=[one for shard in self._public.values() for one in shard.pool],
            failures=failures,
            tips=options.tips,
            count=block.late,
            seed=self._seed + 1,
            known=list(arms),
        )
        self._book.keep_texts(_name(predictor), found)
        return found


class _Watched:
    """An evaluator whose requests are noted."""

    def __init__(self, evaluator: Evaluator, requests: dict[tuple[str, int], Evaluate]) -> None:
        self._evaluator = evaluator
        self._requests = requests

    async def evaluate(self, request: Evaluate) -> Scored:
        self._requests[request.worker, request.task] = request
        return await self._evaluator.evaluate(request)


def _name(predictor: str) -> str:
    """Under which the book keeps what was written during the search: no predictor has such a name."""
    return f"{predictor} (later)"
