"""Every optimizer by its key, run on equal terms: one task, one budget in task-LM calls, one seed."""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import dspy

from asyndbt_dspy import AsynDBT, Budget
from quality_bench import settings as choices
from quality_bench.counting import CountedMetric
from quality_bench.incumbents import Incumbent, Watched
from quality_bench.lms import Lms
from quality_bench.tasks import Examples, Task, balanced

THREADS = 16


@dataclass(frozen=True)
class Job:
    """What an optimizer gets. The test part is not for it: only ``train`` and ``valid`` of ``examples`` are filled.

    Attributes:
        constants: Of the algorithm, where a run of ours is made again that had others than the present ones.
    """

    task: Task
    lms: Lms
    examples: Examples
    budget: int
    seed: int
    metric: CountedMetric
    incumbents: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rollouts(self) -> int:
        """The budget in runs of the program."""
        return max(1, self.budget // self.task.predictors)

    def shuffled(self) -> list[dspy.Example]:
        """trainset in an order of the seed, for optimizers that take its first examples."""
        return random.Random(self.seed).sample(self.examples.train, len(self.examples.train))


@dataclass
class Outcome:
    """What an optimizer returns.

    Attributes:
        settings: That it ran with.
        incumbents: What it would have returned earlier.
        finalists: AsynDBT's final race: held-out examples, paired advantage over the student and its standard error, of
            each challenger; whether it was returned.
    """

    program: dspy.Module
    settings: dict[str, Any] = field(default_factory=dict)
    incumbents: list[Incumbent] = field(default_factory=list)
    finalists: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Optimizer:
    """One method.

    Attributes:
        run: ``Job -> Outcome``.
        searches: Whether it spends the budget; the others are run once per seed, with budget 0.
        seeded: Whether it depends on the seed.
        ranked: Whether it returns one program for all inputs; methods that choose demos anew for each input, and the
            classifier, are shown but not ranked.
        feedback: Whether its metric explains its scores.
    """

    run: Callable[[Job], Outcome]
    searches: bool = True
    seeded: bool = True
    ranked: bool = True
    feedback: bool = False


def _student(job: Job) -> Outcome:
    return Outcome(job.task.build())


def _labeled_few_shot(job: Job) -> Outcome:
    """DSPy's documented default: 16 labelled examples."""
    made = dspy.LabeledFewShot(k=16).compile(job.task.build(), trainset=job.shuffled(), sample=False)
    return Outcome(made, {"k": 16})


def _chosen(job: Job, name: str) -> dict[str, Any]:
    shape = choices.Shape(len(job.examples.valid), job.task.predictors)
    return choices.settings_for(name, job.budget, shape)


def _bootstrap_rs(job: Job, chosen: dict[str, Any] | None = None) -> Outcome:
    chosen = chosen or _chosen(job, "bootstrap_rs")
    options = {name: value for name, value in chosen.items() if name != "valid_examples"}
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=job.metric, num_threads=THREADS, max_errors=1_000_000, **options
    )
    valid = balanced(job.examples.valid, chosen["valid_examples"], job.seed)
    return Outcome(
        optimizer.compile(job.task.build(), trainset=job.shuffled(), valset=valid),
        chosen,
    )


def _mipro_v2(job: Job, chosen: dict[str, Any] | None = None) -> Outcome:
    chosen = chosen or _chosen(job, "mipro_v2")
    optimizer = dspy.MIPROv2(
        metric=job.metric,
        prompt_model=job.lms.proposer,
        task_model=job.lms.task,
        auto=None,
        num_candidates=chosen["num_candidates"],
        max_bootstrapped_demos=chosen["max_bootstrapped_demos"],
        max_labeled_demos=chosen["max_labeled_demos"],
        num_threads=THREADS,
        max_errors=1_000_000,
        seed=job.seed + 1,  # it takes 0 for "none"
    )
    optimizer.num_instruct_candidates = chosen["num_instruct_candidates"]
    made = optimizer.compile(
        job.task.build(),
        trainset=job.shuffled(),
        valset=job.examples.valid,
        num_trials=chosen["num_trials"],
        minibatch=chosen["minibatch"],
        minibatch_size=chosen["minibatch_size"],
    )
    return Outcome(made, chosen)


def _simba(job: Job, chosen: dict[str, Any] | None = None) -> Outcome:
    chosen = chosen or _chosen(job, "simba")
    options = {name: value for name, value in chosen.items() if name != "train_examples"}
    optimizer = dspy.SIMBA(metric=job.metric, prompt_model=job.lms.proposer, num_threads=THREADS, **options)
    sample = balanced(job.examples.train, chosen["train_examples"], job.seed)
    return Outcome(optimizer.compile(job.task.build(), trainset=sample, seed=job.seed), chosen)


def _gepa(job: Job, chosen: dict[str, Any] | None = None) -> Outcome:
    chosen = chosen or _chosen(job, "gepa")
    optimizer = dspy.GEPA(
        metric=job.metric,
        reflection_lm=job.lms.proposer,
        max_metric_calls=chosen["max_metric_calls"],
        num_threads=THREADS,
        seed=job.seed,
    )
    valid = balanced(job.examples.valid, chosen["valid_examples"], job.seed)
    return Outcome(optimizer.compile(job.task.build(), trainset=job.shuffled(), valset=valid), chosen)


def _copro(job: Job, chosen: dict[str, Any] | None = None) -> Outcome:
    chosen = chosen or _chosen(job, "copro")
    optimizer = dspy.COPRO(
        prompt_model=job.lms.proposer,
        metric=job.metric,
        breadth=chosen["breadth"],
        depth=chosen["depth"],
    )
    made = optimizer.compile(
        job.task.build(),
        trainset=balanced(job.examples.train, chosen["train_examples"], job.seed),
        eval_kwargs={"num_threads": THREADS, "display_progress": False},
    )
    return Outcome(made, chosen)


SEARCHES: dict[str, Callable[..., Outcome]] = {
    "bootstrap_rs": _bootstrap_rs,
    "mipro_v2": _mipro_v2,
    "simba": _simba,
    "gepa": _gepa,
    "copro": _copro,
}
"""The optimizers with a ladder of settings: ``(job, settings) -> Outcome``; without settings the committed ones."""


class _WatchedAsynDBT(AsynDBT):
    """Keeps what the run would return at several points of its budget."""

    watched: Watched | None = None

    def make_engine(self) -> Any:
        self.watched = Watched(super().make_engine())
        return self.watched


def asyndbt(**options: Any) -> Callable[[Job], Outcome]:
    """AsynDBT with three workers and these arguments; a constant of the algorithm may be named like an argument."""

    def run(job: Job) -> Outcome:
        arguments, config = _split(options)
        arguments = {
            "workers": 3,
            "budget": Budget(metric_calls=job.rollouts),
            "seed": job.seed,
            "deterministic": True,
            "progress": False,
            **arguments,
        }
        present = AsynDBT(job.metric, **arguments, config=config).config.to_dict()
        of_before = {
            name: value
            for name, value in job.constants.items()
            if name in _CONSTANTS - _RESOLVED and value != present[name]
        }
        optimizer = _WatchedAsynDBT(job.metric, **arguments, config={**config, **of_before})
        if not job.incumbents:
            optimizer.make_engine = lambda: AsynDBT.make_engine(optimizer)  # type: ignore[method-assign]
        made = optimizer.compile(job.task.build(), trainset=job.examples.train, valset=job.examples.valid)
        assert optimizer.result is not None
        kept = optimizer.watched.incumbents if optimizer.watched is not None else []
        finalists = [
            {
                "examples": one.examples,
                "advantage": one.advantage,
                "error": one.advantage_error,
                "won": one.won,
            }
            for one in optimizer.result.candidates[1:]
        ]
        settings = {**options, "algorithm": optimizer.result.settings["algorithm"]}
        return Outcome(made, settings, kept, finalists)

    return run


_CONSTANTS = frozenset(AsynDBT(lambda *_: True, progress=False).config.to_dict())
_RESOLVED = frozenset(
    {"active_workers", "max_staleness", "auto_active", "auto_staleness", "keep_busy", "balance"}
)
"""Constants that a compile fills in from its arguments."""


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``AsynDBT``, and constants of its ``config``; what could be either is an argument if that takes the value."""
    constants = {
        name: value
        for name, value in options.items()
        if name in _CONSTANTS
        and name not in ("active_workers", "max_staleness")
        and (name, value) not in (("loss", "metric"), ("loss", "auto"))
    }
    return {name: value for name, value in options.items() if name not in constants}, constants


def _registry() -> dict[str, Optimizer]:
    from quality_bench import baselines

    found = {
        "student": Optimizer(_student, searches=False, seeded=False),
        "labeled_few_shot": Optimizer(_labeled_few_shot, searches=False),
        "bootstrap_rs": Optimizer(_bootstrap_rs),
        "mipro_v2": Optimizer(_mipro_v2),
        "simba": Optimizer(_simba),
        "gepa": Optimizer(_gepa, feedback=True),
        "copro": Optimizer(_copro),
    }
    for name, run in baselines.BASELINES.items():
        found[name] = Optimizer(run, **baselines.TRAITS[name])
    found |= {
        # BDPL is the policy gradient over instruction fragments alone, centralised.
        "bdpl": Optimizer(asyndbt(preset="cendbt", mode="instructions", workers=1)),
        "asyndbt": Optimizer(asyndbt()),
        "asyndbt_paper": Optimizer(asyndbt(preset="paper")),
        "cendbt": Optimizer(asyndbt(preset="cendbt", workers=1)),
        "asyndbt_prompt_only": Optimizer(asyndbt(mode="instructions")),
        "asyndbt_demo_only": Optimizer(asyndbt(mode="demos")),
    }
    return found


OURS = ("asyndbt", "asyndbt_paper", "cendbt", "asyndbt_prompt_only", "asyndbt_demo_only", "bdpl")
"""Rows made by our own code; the best *other* optimizer is none of them."""


def is_ours(key: str) -> bool:
    return key.partition("[")[0] in OURS


def find(key: str) -> Optimizer:
    """The optimizer of a key. ``asyndbt[race=False,draws=4]`` is AsynDBT with these arguments or constants.

    Raises:
        KeyError: unknown key, or options for an optimizer that takes none.
    """
    known = _registry()
    name, _, options = key.partition("[")
    if not options:
        if name not in known:
            raise KeyError(f"no optimizer {key!r}; known: {', '.join(known)}")
        return known[name]
    if name != "asyndbt" or not options.endswith("]"):
        raise KeyError(f"{key!r}: only asyndbt[name=value,…] takes options")
    return Optimizer(asyndbt(**_options(key, options[:-1])))


def _options(key: str, text: str) -> dict[str, Any]:
    """``race=False,draws=4`` as a dictionary.

    Raises:
        KeyError: no list of ``name=value``, or what is neither an argument nor a constant.
    """
    try:
        given = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(given, ast.Call)
        found = {str(one.arg): ast.literal_eval(one.value) for one in given.keywords}
    except (SyntaxError, ValueError) as error:
        raise KeyError(f"{key!r}: options are name=value,…: {error}") from error
    known = _CONSTANTS | set(inspect.signature(AsynDBT).parameters)
    if given.args or not set(found) <= known:
        odd = [ast.unparse(one) for one in given.args] + sorted(set(found) - known)
        raise KeyError(f"{key!r}: {odd} are no name=value of an argument or constant of AsynDBT")
    return found


def keys() -> list[str]:
    return list(_registry())
