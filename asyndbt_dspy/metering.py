"""Money and limits of one compile: every LM that it calls is metered into one ledger, whoever calls it."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import dspy

from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.errors import BudgetExceededError, ConfigurationError
from asyndbt_dspy.lms.call_watch import CallWatch
from asyndbt_dspy.lms.endpoints import endpoint_key
from asyndbt_dspy.lms.estimates import Estimate, WorkerPlan, estimate_run, rough_tokens
from asyndbt_dspy.lms.fallback import fallback
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.lms.limits import RateLimits
from asyndbt_dspy.lms.metered import metered
from asyndbt_dspy.lms.prices import Price, Tariff
from asyndbt_dspy.programs.copies import copy_program, shared_parts
from asyndbt_dspy.programs.evaluator import WorkerUse
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.sharding import Shard
from asyndbt_dspy.workers import Worker

logger = logging.getLogger(__name__)

WIRE_CAPS = ("lm_calls", "tokens", "dollars")
"""Caps on what goes over the wire."""
PROPOSER = "proposer"
"""The proposer's line in the ledger."""
METER_SETTING = "asyndbt_meter"
"""Key in ``dspy.settings`` within a compile whose calls are metered: ``lm -> lm`` for models that a program asks past its
predictors."""
OWN_MODELS = "asyndbt_own_models"
"""Method of modules that ask such models: all LMs that they would ask where none answers in their place."""
AMBIENT_SETTING = "langchain_ambient_lm"
"""Key in ``dspy.settings``: the surrounding LM where it does not answer for the program (``langchain_asyndbt`` sets it)."""
_UNCOUNTED = 30
"""Rollouts without any call that counts, after which a cap on calls is not believed to end the run."""
_NO_LIMITS = RateLimits()
_TURNS = ("max_iters", "max_iterations")
"""What DSPy's modules that loop call the most turns that they take."""
_COMPLETION_TOKENS = 60
"""Of an answer, where nothing is known of it."""


class Metering:
    """The ledger of one compile, and metered forms of its LMs. The user's LMs and programs are never changed.

    Args:
        budget: Caps of the run.
        workers: Of the run; metering is on where one asks for it, or the budget or ``prices`` do.
        kept_back: Share of the caps on the wire in [0, 1) that is kept for the final race.
        prices: By model name, where the price table has none or another.

    Raises:
        ConfigurationError: see ``metered``; raised by the methods that are given an LM, before any call.
    """

    def __init__(
        self, budget: Budget, kept_back: float, prices: Mapping[str, Price], workers: Sequence[Worker] = ()
    ) -> None:
        self.budget = budget
        self.has_wire_caps = any(getattr(budget, name) is not None for name in WIRE_CAPS)
        self.ledger = Ledger(budget, kept_back if self.has_wire_caps else 0.0)
        self.prices = dict(prices)
        # Where nobody asks for a cap, a limit, a price or a second LM, LMs are called as they are.
        self.is_on = self.has_wire_caps or bool(prices) or any(map(_asks_for_metering, workers))
        self.refused: BudgetExceededError | None = None
        self._is_open = not self.has_wire_caps
        self._metered: dict[int, tuple[Any, Any]] = {}
        self._lock = threading.Lock()
        # Workers without an LM of their own ask the LMs of others: what was said of these is theirs.
        lending = [worker for worker in workers if not worker.lms]
        self._limits = _tightest(lending)
        self._lent_price = next((worker.price for worker in lending if worker.price is not None), None)
        self._is_counting = False
        self._uncounted = 0
        self._told_of_uncounted = False
        self._wants_dollars = bool(prices) or any(worker.price is not None for worker in workers)
        self._told_of_price: set[str] = set()
        self._refusal: ConfigurationError | None = None

    def note_refused(self, error: BudgetExceededError) -> None:
        """A call was refused before there was a search to end."""
        self.refused = error

    def has_spent(self, share: float) -> bool:
        """Whether so much of a cap on the wire is gone, calls in flight included."""
        spent, budget = self.ledger.spent, self.budget
        gone = {
            "lm_calls": spent.lm_calls,
            "tokens": spent.tokens + spent.reserved_tokens,
            "dollars": float(spent.dollars + spent.reserved_dollars),
        }
        caps = ((gone[name], getattr(budget, name)) for name in WIRE_CAPS)
        return any(cap is not None and amount >= share * cap for amount, cap in caps)

    def open_kept_back(self) -> None:
        """The final race begins: from now on all of every cap may be spent."""
        if not self._is_open:
            self._is_open = True
            self.ledger.keep_back(0.0)

    def lm(self, lm: Any, name: str | None = None, limits: RateLimits = _NO_LIMITS) -> Any:
        """``lm`` metered; its attempts are written to the line of ``name``, or of whichever worker calls."""
        if lm is None or not self._can_meter(lm):
            return lm
        known = self._metered.get(id(lm))
        if name is None and known is not None:
            return known[1]
        price = self._price(lm) if limits is _NO_LIMITS else self._price(lm) or self._lent_price
        self._tell_of_price(lm, price)
        found = metered(
            lm,
            ledger=self.ledger,
            worker=name,
            prices=price,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            limiter=limits.limiter,
        )
        if name is None:
            self._metered[id(lm)] = (lm, found)  # with the LM, so that its id stays its own
        return found

    def surrounding_lm(self, lm: Any) -> Any:
        """``lm`` of ``dspy.configure`` metered, for a metric or a part of the program that calls it."""
        try:
            return self.lm(lm)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error}. No worker has this LM; it is the surrounding one, which the metric or a part of the program may "
                "call. Where nothing does, compile within dspy.context(lm=None)"
            ) from error

    def worker_lm(self, worker: Worker, surrounding: Any) -> Any:
        """What ``worker`` calls: its LMs in order, each limited and counted, one behind the other."""
        lms = worker.lms or ([surrounding] if surrounding is not None else [])
        if not lms or not all(self._can_meter(one) for one in lms):
            return lms[0] if lms else None
        members = [
            metered(
                one,
                ledger=self.ledger,
                worker=worker.name,
                requests_per_minute=worker.requests_per_minute,
                tokens_per_minute=worker.tokens_per_minute,
                max_concurrency=worker.max_concurrency,
                limiter=worker.limiter,
                prices=self._price(one) if worker.price is None else worker.price,
            )
            for one in lms
        ]
        for one in lms:
            self._tell_of_price(one, self._price(one) if worker.price is None else worker.price)
        if len(members) == 1 and worker.hedge_after_s is None:
            return members[0]
        return fallback(members, hedge_after_s=worker.hedge_after_s)

    def program(self, program: dspy.Module, *, is_student: bool = False) -> dspy.Module:
        """A copy of ``program`` whose predictors' own LMs are metered; the program itself where it has none.

        Args:
            is_student: Where all its predictors have an LM, what workers without one are limited to holds for these.
        """
        own = [predictor.lm for _, predictor in program.named_predictors()]
        if all(lm is None for lm in own):
            return program
        limits = self._limits if is_student and all(lm is not None for lm in own) else _NO_LIMITS
        copied = copy_program(program, shared_parts(program))
        for _, predictor in copied.named_predictors():
            predictor.lm = self.lm(predictor.lm, limits=limits)
        return copied

    def own_model(self, lm: Any) -> Any:
        """``lm`` metered, of a program that asks it past its predictors and says so (a LangChain chain), when it does.

        Raises:
            ConfigurationError: a cap that cannot be kept with it; ``note_calls`` ends the run with the same.
        """
        with self._lock:
            try:
                return self.lm(lm, limits=self._limits)
            except ConfigurationError as error:
                is_unbounded = self.ledger.needs_bounds() and not lm.kwargs.get("max_tokens")
                # Nobody made this LM, so nobody could give it one.
                why = f"{lm.model!r} has no max_tokens, so no cap on tokens or dollars can be kept"
                why = why if is_unbounded else str(error)
                self._refusal = ConfigurationError(
                    f"{why}. It is the program's own model: ask it through a worker, Worker(…, lm=langchain_lm(model, "
                    "max_tokens=…), price=Price(…)), or cap metric_calls or lm_calls instead"
                )
                raise self._refusal from error

    def check_own_models(self, *programs: dspy.Module | None) -> None:
        """``own_model`` of all that such programs say they would ask, before any is asked.

        Raises:
            ConfigurationError: a cap that cannot be kept with one of them.
        """
        for program in programs:
            for _, module in [] if program is None else program.named_sub_modules():
                for lm in getattr(module, OWN_MODELS, tuple)():
                    self.own_model(lm)

    def note_calls(self, calls: CallWatch, rollout: Rollout) -> None:
        """A rollout is over: a cap on the wire is kept by calls that are counted.

        Raises:
            ConfigurationError: an LM that cannot be metered was asked; or nothing was counted in many rollouts, and nothing else
                would end the run.
        """
        if not self.has_wire_caps:
            return
        if self._refusal is not None:
            raise self._refusal
        caps = ", ".join(name for name in WIRE_CAPS if getattr(self.budget, name) is not None)
        if calls.unmetered and not self._told_of_uncounted:
            self._told_of_uncounted = True
            logger.warning(
                "The program or the metric calls %s past the program's predictors, and not as the surrounding LM: these calls "
                "do not count against the budget's caps on %s. This is said once.",
                calls.unmetered,
                caps,
            )
        if self._is_counting:
            return
        lines = self.ledger.lines().values()
        self._is_counting = any(line.attempts or line.cache_hits for line in lines)
        self._uncounted += not self._is_counting and rollout.score is not None and rollout.failure is None
        if self._uncounted >= _UNCOUNTED and self.budget.metric_calls is None and self.budget.seconds is None:
            raise ConfigurationError(
                f"the budget caps {caps} alone, and in {self._uncounted} rollouts no LM call was counted, so nothing would end "
                "the run. Give the program's predictors their LM (set_lm) or a surrounding one (dspy.configure), or cap "
                "metric_calls as well"
            )

    @staticmethod
    def answering_lm() -> Any:
        """The surrounding LM; ``None`` where it is there for others than the program, which asks its own models then."""
        lm = dspy.settings.lm
        return None if lm is dspy.settings.get(AMBIENT_SETTING, None) else lm

    def surroundings(self) -> dict[str, Any]:
        """What of ``dspy.context`` is to be metered: the surrounding LM, under whatever names, the adapter with its own LMs
        (``dspy.TwoStepAdapter``), and what programs pass models through that they ask past their predictors."""
        adapter, surrounding = dspy.settings.adapter, dspy.settings.lm
        own = {
            name: lm for name, lm in getattr(adapter, "__dict__", {}).items() if isinstance(lm, dspy.BaseLM)
        }
        if own:
            adapter = copy.copy(adapter)
            vars(adapter).update({name: self.lm(lm) for name, lm in own.items()})
        lm = self.surrounding_lm(surrounding)
        named = (
            [] if lm is None else [name for name, one in dspy.settings.config.items() if one is surrounding]
        )
        own = {METER_SETTING: self.own_model} if self.is_on else {}
        return {**dict.fromkeys(named, lm), "lm": lm, "adapter": adapter, **own}

    def _price(self, lm: Any) -> Price | None:
        given = self.prices.get(str(lm.model))
        if given is None and not isinstance(getattr(lm, "engine", None), str) and hasattr(lm, "engine"):
            return (
                _FREE if hasattr(lm.engine, "greedy_by_default") else None
            )  # an engine of ours, in this process
        return given

    def _tell_of_price(self, lm: Any, price: Price | None) -> None:
        """Once per LM, and only where dollars are asked for: elsewhere the result's "unknown" says it all."""
        if not self._wants_dollars or not isinstance(getattr(lm, "engine", None), str):
            return
        if lm.model not in self._told_of_price and Tariff(lm, price).worst is None:
            self._told_of_price.add(lm.model)
            logger.warning(
                "%s has no known price: its dollars are not counted, only its tokens; give prices={%r: Price(…)}",
                lm.model,
                lm.model,
            )

    def _can_meter(self, lm: Any) -> bool:
        if not self.is_on or not isinstance(lm, dspy.BaseLM):
            return False
        if getattr(lm, "model_type", "chat") == "text" and not self.has_wire_caps:
            logger.warning(
                "%s is a text-completion model: its calls are neither limited nor counted", lm.model
            )
            return False
        return True


_FREE = Price(0.0, 0.0)


def _tightest(workers: Sequence[Worker]) -> RateLimits:
    found = _NO_LIMITS
    for worker in workers:
        own = RateLimits(worker.requests_per_minute, worker.tokens_per_minute, worker.limiter)
        found = own.tighter(found)
    return found


def _asks_for_metering(worker: Worker) -> bool:
    limits = (worker.requests_per_minute, worker.tokens_per_minute, worker.hedge_after_s, worker.price)
    return len(worker.lms) > 1 or any(one is not None for one in limits)


def with_lms_of(student: dspy.Module, program: dspy.Module) -> dspy.Module:
    """``program`` with the LMs of the student's predictors in place of metered ones."""
    own = dict(student.named_predictors())
    for name, predictor in program.named_predictors():
        predictor.lm = own[name].lm
    return program


def make_plans(
    metering: Metering,
    student: dspy.Module,
    shards: Sequence[Shard],
    surrounding: Any,
    *,
    demo_tokens: float,
) -> list[WorkerPlan]:
    """What the run is expected to take at most, before any call.

    The metric calls of the budget, or as many as its other caps pay for, each with ``_most_calls``, a prompt as
    the student's with the demos that it may come to show, and answers of ``max_tokens`` where that is small.
    """
    predictors = [predictor for _, predictor in student.named_predictors()]
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    plans: list[WorkerPlan] = []
    for shard in shards:
        lm = (shard.worker.lms or [surrounding])[0]
        prompts = [_prompt_tokens(adapter, predictor, shard.estimate[0]) for predictor in predictors]
        limit = (getattr(lm, "kwargs", None) or {}).get("max_tokens")
        plans.append(
            WorkerPlan(
                shard.worker.name,
                0,
                _most_calls(student),
                sum(prompts) / len(prompts) + demo_tokens,
                min(_COMPLETION_TOKENS, limit or _COMPLETION_TOKENS),
                _known_price(metering, shard.worker, lm),
                max_concurrency=shard.worker.max_concurrency,
                endpoint=endpoint_key(lm) if isinstance(lm, dspy.BaseLM) else "",
                limits=RateLimits(
                    shard.worker.requests_per_minute, shard.worker.tokens_per_minute, shard.worker.limiter
                ),
            )
        )
    return _shared_out(metering.budget, plans)


def measured_plans(
    plans: Sequence[WorkerPlan], uses: Mapping[str, WorkerUse], budget: Budget, *, demo_tokens: float
) -> list[WorkerPlan]:
    """``plans`` again, once the workers have made their first rollouts, of the student as it is: tells the user too.

    Args:
        demo_tokens: That prompts may grow by.
    """
    found: list[WorkerPlan] = []
    for plan in plans:
        use = uses.get(plan.worker)
        if use is None or not use.calls or not use.lm_calls:
            found.append(plan)
            continue
        plan = plan.as_measured(use.calls, use.lm_calls, use.prompt_tokens, use.completion_tokens)
        found.append(replace(plan, prompt_tokens=plan.prompt_tokens + demo_tokens))
    if found == list(plans):
        return found
    found = _shared_out(budget, found)
    logger.info("By its first rollouts, this compile may take %s.", estimate_run(found))
    return found


def _shared_out(budget: Budget, plans: Sequence[WorkerPlan]) -> list[WorkerPlan]:
    rollouts = affordable(budget, plans) / len(plans)
    return [replace(plan, rollouts=rollouts) for plan in plans]


def confirm(asked: Callable[[Estimate], bool] | None, plans: Sequence[WorkerPlan]) -> None:
    """Tell the user what the run may take, and let them refuse.

    Raises:
        ConfigurationError: refused; nothing was called.
    """
    expected = estimate_run(plans)
    logger.info("This compile may take %s.", expected)
    if asked is not None and not asked(expected):
        raise ConfigurationError(
            f"refused by confirm=: the compile may take {expected}. Nothing was called; lower the budget, or confirm"
        )


def affordable(budget: Budget, plans: Sequence[WorkerPlan]) -> float:
    """Rollouts that every cap pays for; 0 where only time is capped."""
    calls = sum(plan.calls_per_rollout for plan in plans) / len(plans)
    tokens = sum(
        plan.calls_per_rollout * (plan.prompt_tokens + plan.completion_tokens) for plan in plans
    ) / len(plans)
    found = [float(one) for one in (budget.metric_calls,) if one is not None]
    if budget.lm_calls is not None:
        found.append(budget.lm_calls / calls)
    if budget.tokens is not None:
        found.append(budget.tokens / tokens)
    ones = [replace(plan, rollouts=1.0).dollars for plan in plans]
    dollars = sum(one for one in ones if one is not None) / len(plans)
    if budget.dollars is not None and dollars > 0:
        found.append(budget.dollars / dollars)
    return min(found, default=0.0)


def _known_price(metering: Metering, worker: Worker, lm: Any) -> Price | None:
    if not isinstance(lm, dspy.BaseLM):
        return None
    return Tariff(lm, worker.price or metering._price(lm)).worst


def _most_calls(program: dspy.Module) -> int:
    """LM calls of one rollout, as far as the program's form tells: one per predictor, but of a part that loops over tool calls
    or code (``dspy.ReAct`` and its like) one per turn and one to answer."""
    predictors = {id(one) for _, one in program.named_predictors()}
    turns = 0
    for _, part in program.named_sub_modules():
        found = (getattr(part, name, None) for name in _TURNS)
        most = next((one for one in found if isinstance(one, int)), None)
        inner = {id(one) for _, one in part.named_predictors()}
        if most is not None and inner & predictors:
            turns += most + 1
            predictors -= inner
    return turns + len(predictors)


def _prompt_tokens(adapter: Any, predictor: Any, example: dspy.Example) -> int:
    """About how long a prompt is; what the program makes itself is not known. An estimate ends no compile."""
    known = {name: example.get(name, "") for name in predictor.signature.input_fields}
    try:
        messages = adapter.format(signature=predictor.signature, demos=list(predictor.demos), inputs=known)
        return rough_tokens(messages)
    except Exception:  # noqa: BLE001 - adapters and users' types raise what they like
        text = f"{predictor.signature.instructions} {predictor.demos} {known}"
        return rough_tokens([{"role": "user", "content": text.encode("utf-8", "replace").decode()}])
