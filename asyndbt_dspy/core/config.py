"""Every constant of the algorithm: symbol, range, unit, source. ``docs/notation.md`` is the table.

Two presets: ``PAPER`` is faithful to arXiv:2602.17694, ``DEFAULT`` has our own improvements on (the ``[O]`` parts of
the design; each is one field here, so that an ablation can turn it off).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

from asyndbt_dspy.errors import ConfigurationError

Aggregator = Literal["sign", "mean", "trimmed_mean", "median"]


@dataclass(frozen=True)
class AlgorithmConfig:
    """Constants of one run. Immutable; ``dataclasses.replace`` makes a variant.

    Attributes:
        active_workers: S >= 1. The server updates once so many workers have answered.
        max_staleness: tau >= 1. A message is at most ``tau - 1`` updates of z late; 1 is synchronous.
        auto_active: S follows what is observed of the workers' speeds; ``active_workers`` is where it starts [O 6].
        auto_staleness: tau follows it, between ``max_staleness`` and four times as much [O 6].
        keep_busy: A worker whose answer makes no update yet goes on with its next minibatch from the same z, at most tau
            times, instead of waiting for others; an update is made of S answers then, whoever gave them [O 7.2].
        balance: Workers that are known to be slow get smaller units, and search and race do not wait for what these have not
            begun [O 6].
        iterations: T >= 1, the largest number of server iterations.
        loss: What a rollout teaches where the LM reports a distribution over the answers. ``margin``: clipped margin of
            the right answer and the metric [O 7.13]. ``cross_entropy``: of the right answer. Elsewhere ``1 - score``.
        draws: I >= 1 (>= 2 for score functions). Candidates that a worker scores per step.
        minibatch: B >= 1. Examples per candidate and step.
        exploration: >= 0. Spread of Thompson draws in deviations of the posterior; 1 is plain Thompson sampling, which
            explores for longer than a few hundred calls last [O 7.5].
        policy: How a worker's distributions learn. ``score_function``: policy gradient (BDPL). ``posterior``: Bayesian
            model of arm effects with Thompson sampling [O 7.5].
        geometry: ``euclidean``: projected step (paper). ``exponentiated``: mirror descent [O 7.4].
        floor: In [0, 1). With ``exponentiated`` every arm keeps ``floor / N``.
        adam: Wrap the whole bracket in Adam before the projection (paper).
        gradient_clip: Largest Euclidean norm of an estimate (BDPL: 3); ``inf`` turns it off.
        normalise: Scale each estimate to unit largest advantage, so that steps do not depend on the metric's unit
            [O 7.4].
        example_baseline: Per-example running mean of losses as control variate [O 7.3].
        common_examples: Candidates meet the shard's examples in one common order, so that comparisons are paired and a
            candidate drawn again goes on where it stopped [O 7.3]; else a random minibatch per step.
        split_levels: Score the lower level on one half of the shard and the upper level on the other [O 7.1].
        hypergradient: Planes carry the q-part ``d[v] = -(d phi / d q_v)^T s`` [O 7.1]. With ``score_function`` and
            ``buffered_lower`` only: elsewhere there is none.
        buffered_lower: The server computes phi from estimates that workers already paid for, without a barrier [O 7.2];
            else K communication rounds in which every worker is asked (paper).
        rekey_planes: One plane per sign pattern, refreshed in place [O 5]; else planes pile up (paper).
        share_credit: A demo's worth is shared over the slots of a predictor [O 7.5].
        share_effects: Workers exchange what they learned about shared arms (partitioned variational inference) [O 7.5].
        effect_trust: In [0, 1]. Weight of what other workers learned.
        stale_step: A late worker's next step is scaled by ``1 / sqrt(1 + staleness)``, and with ``keep_busy`` workers
            count with the distances of their points from the z that these were made from (``core.lateness``) [O 7.9].
        importance_limit: >= 1. Clip of importance weights for earlier samples [O 7.9]; 0 turns the buffer off.
        clip_consensus: Clip theta, rho and mu (p - z) to [-psi, psi] [O 7.10].
        aggregator: How z follows the workers' p: ``sign`` is the paper's subgradient, the others are [O 7.10].
        trim: >= 0. Workers cut from each end by ``trimmed_mean``.
        share_demos: Race programs built from the union of the demos that workers nominate [O 7.8].
        race: Compare final candidates and the student on held-out data [O 7.7]; else return ``argmax z, argmax q``.
        repeats: Scores are noisy (a sampling LM, a judge): a rollout that is made again is new evidence, and the race makes
            rollouts again while it is undecided and has calls left [O 7.7]. Off: each is made once.
        missing_is_zero: Score a failed LM call 0, as other optimizers do; the default leaves it out [O 7.12].
        lower_step, upper_step, consensus_step, plane_step, dual_step: eta_p, eta_q, eta_z, eta_lambda, eta_theta >= 0.
        lower_rounds: K >= 1, rounds of the lower-level estimate.
        round_step, round_consensus_step, round_dual_step: step sizes of the rounds for p, z and rho.
        proximal: mu >= 0.
        penalty: psi >= 0, weight of the consensus penalty ``|p - z|_1``.
        plane_damping, dual_damping: c1, c2 >= 0.
        plane_tolerance: epsilon >= 0 of ``h <= epsilon``.
        plane_period: delta >= 1, iterations between refreshes of the planes.
        plane_iterations: T1 >= 0, no plane is added from iteration T1 on.
        plane_drop: gamma >= 0, a plane below it twice in a row is dropped.
        stationarity: epsilon of the stop criterion on the squared norm of the scaled step of ``(p, z)``; 0: off.
        patience: >= 1, iterations in a row below ``stationarity``.
        race_fraction: In [0, 1), part of the calls kept back for the final race.
        race_examples: >= 0. Without a valset so many examples, of all workers, are kept back for the final race: a quarter at
            least, half at most.
        race_candidates: >= 1, largest number of final candidates besides the student.
        accept_z: >= 0. The winner replaces the student if its paired advantage exceeds so many standard errors (more
            where examples are few, as in a t test); 0: any advantage will do.
        accept_score_z: >= 0. Standard errors by which the metric alone must be ahead as well, where race values also count how
            sure the LM is (``race_soft``); at most ``accept_z`` count. 0: it must not be behind.
        race_soft: In [0, 1]. Weight of the LM's probability of the right answer in a race value, where it is reported.
    """

    active_workers: int = 1
    max_staleness: int = 64
    auto_active: bool = False
    auto_staleness: bool = False
    keep_busy: bool = False
    balance: bool = True
    iterations: int = 10_000
    loss: Literal["margin", "cross_entropy"] = "margin"
    draws: int = 2
    minibatch: int = 6
    exploration: float = 0.5
    policy: Literal["score_function", "posterior"] = "posterior"
    geometry: Literal["euclidean", "exponentiated"] = "exponentiated"
    floor: float = 0.01
    adam: bool = False
    gradient_clip: float = math.inf
    normalise: bool = True
    example_baseline: bool = True
    common_examples: bool = True
    split_levels: bool = False
    hypergradient: bool = False
    buffered_lower: bool = True
    rekey_planes: bool = True
    share_credit: bool = True
    share_effects: bool = True
    effect_trust: float = 1.0
    stale_step: bool = True
    importance_limit: float = 10.0
    clip_consensus: bool = True
    aggregator: Aggregator = "mean"
    trim: int = 0
    share_demos: bool = True
    race: bool = True
    repeats: bool = False
    missing_is_zero: bool = False
    lower_step: float = 0.7
    upper_step: float = 0.7
    consensus_step: float = 0.1
    plane_step: float = 0.5
    dual_step: float = 0.1
    lower_rounds: int = 5
    round_step: float = 0.1
    round_consensus_step: float = 0.1
    round_dual_step: float = 0.1
    proximal: float = 1.0
    penalty: float = 0.1
    plane_damping: float = 0.04
    dual_damping: float = 0.002
    plane_tolerance: float = 0.1
    plane_period: int = 1
    plane_iterations: int = 1_000_000
    plane_drop: float = 1e-3
    stationarity: float = 0.0
    patience: int = 3
    race_fraction: float = 0.4
    race_examples: int = 24
    race_candidates: int = 7
    accept_z: float = 2.0
    accept_score_z: float = 0.5
    race_soft: float = 0.6

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        at_least_one = ("active_workers", "max_staleness", "iterations", "draws", "minibatch", "lower_rounds")
        for name in (*at_least_one, "plane_period", "patience", "race_candidates"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        for name in _NON_NEGATIVE:
            self._check(name, getattr(self, name) >= 0, ">= 0")
        for name in ("floor", "race_fraction"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("effect_trust", "race_soft"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("importance_limit", not 0 < self.importance_limit < 1, ">= 1, or 0 for no buffer")
        if self.aggregator == "trimmed_mean":
            self._check("trim", self.trim >= 1, ">= 1 with aggregator='trimmed_mean', which else is the mean")
        if self.policy == "score_function" and not self.example_baseline:
            self._check(
                "draws", self.draws >= 2, ">= 2 for a score-function estimate without example_baseline"
            )

        if self.hypergradient:
            additive = "'score_function' with hypergradient (the posterior's model is additive: q moves no gradient of p)"
            self._check("policy", self.policy == "score_function", additive)
            self._check(
                "buffered_lower", self.buffered_lower, "True with hypergradient (rounds carry no derivatives)"
            )

    def _check(self, name: str, holds: bool, bound: str) -> None:
        if not holds:
            raise ConfigurationError(
                f"{name}={getattr(self, name)!r} must be {bound}; set {name} accordingly"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> AlgorithmConfig:
        return cls(**state)


@functools.cache
def _kinds() -> dict[str, Any]:
    """Per constant what it is: ``bool``, ``int``, ``float``, or the tuple of its choices."""
    hints = get_type_hints(AlgorithmConfig)
    return {name: get_args(hint) or hint for name, hint in hints.items()}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """``value`` as Python's own type: a text in place of a number, or half a minibatch, would crash after rollouts were paid for.

    Raises:
        ConfigurationError: it is of another kind.
    """
    if isinstance(kind, tuple):
        if isinstance(value, str) and value in kind:
            return value
        raise ConfigurationError(f"{name}={value!r} is none of {list(kind)}")
    if kind is bool:
        if isinstance(value, bool | np.bool_):
            return bool(value)
        raise ConfigurationError(f"{name}={value!r} must be True or False")
    if kind is int:
        return whole_number(name, value)
    may_be_infinite = name in _MAY_BE_INFINITE
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or (math.isinf(value) and not may_be_infinite):
        raise ConfigurationError(f"{name}={value!r} must be a {'' if may_be_infinite else 'finite '}number")
    return value if type(value) in (int, float) else float(value)


def whole_number(name: str, value: Any) -> int:
    """``value`` as an ``int``, where it is one of any type (NumPy's too, and ``300.0``).

    Raises:
        ConfigurationError: a fraction, ``True``, or no number.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value):
        raise ConfigurationError(f"{name}={value!r} must be a whole number")
    return int(value)


_MAY_BE_INFINITE = ("gradient_clip", "importance_limit")
_NON_NEGATIVE = (
    "exploration",
    "gradient_clip",
    "importance_limit",
    "trim",
    "lower_step",
    "upper_step",
    "consensus_step",
    "plane_step",
    "dual_step",
    "round_step",
    "round_consensus_step",
    "round_dual_step",
    "proximal",
    "penalty",
    "plane_damping",
    "dual_damping",
    "plane_tolerance",
    "plane_iterations",
    "plane_drop",
    "stationarity",
    "race_examples",
    "accept_z",
    "accept_score_z",
)

DEFAULT = AlgorithmConfig()
"""Our improvements on. What a user gets."""

PAPER = AlgorithmConfig(
    balance=False,
    loss="cross_entropy",
    draws=4,
    minibatch=4,
    policy="score_function",
    geometry="euclidean",
    floor=0.0,
    max_staleness=15,
    adam=True,
    gradient_clip=3.0,
    normalise=False,
    example_baseline=False,
    common_examples=False,
    buffered_lower=False,
    rekey_planes=False,
    share_credit=False,
    share_effects=False,
    stale_step=False,
    importance_limit=0.0,
    clip_consensus=False,
    aggregator="sign",
    share_demos=False,
    race=False,
    lower_step=1e-4,
    upper_step=1e-4,
    consensus_step=1e-4,
    plane_step=1e-1,
    dual_step=1e-1,
    lower_rounds=1,
    round_step=1e-4,
    round_consensus_step=1e-4,
    round_dual_step=1e-1,
    penalty=0.1,
    plane_tolerance=1e-6,
    plane_period=5,
    plane_drop=1e-9,
    race_fraction=0.0,
)
"""Faithful to the paper: score functions, Euclidean projection, Adam at 1e-4, barrier rounds, argmax decoding."""

CENTRALISED = dataclasses.replace(
    PAPER,
    max_staleness=1,
    aggregator="mean",
    consensus_step=0.0,
    dual_step=0.0,
    plane_iterations=0,
    penalty=0.0,
)
"""cenDBT: the paper's method with one worker and no z, theta or rho."""

PRESETS: dict[str, AlgorithmConfig] = {"default": DEFAULT, "paper": PAPER, "cendbt": CENTRALISED}


def resolve(
    config: AlgorithmConfig,
    workers: int,
    active_workers: int | Literal["auto"] | None,
    max_staleness: int | Literal["auto"] | None,
    *,
    is_free: bool = True,
    said: Collection[str] = (),
) -> AlgorithmConfig:
    """Fill in S and tau.

    Args:
        active_workers: ``"auto"``: as the observed speeds have it, and nobody waits for others; it begins with half of the workers.
            ``None``: so where ``is_free`` and tau is not said either, else half of the workers.
        max_staleness: ``"auto"``: follows the slowest worker, from the configured bound on. ``None``: the configured bound.
        said: Constants of ``config`` that the user set; they stay as they are, and S and tau among them count as given here.

    Raises:
        ConfigurationError: another text, no whole number, or S outside of 1 .. ``workers``.
    """
    given = {"active_workers": active_workers, "max_staleness": max_staleness}
    for name, value in given.items():
        if isinstance(value, str) and value != "auto":
            raise ConfigurationError(f"{name}={value!r} must be a number, 'auto' or None")
        if value is None and name in said:
            given[name] = getattr(config, name)
        elif value is not None and value != "auto":
            given[name] = whole_number(name, value)
    active_workers, max_staleness = given["active_workers"], given["max_staleness"]
    if active_workers == "auto" or (active_workers is None and max_staleness is None and is_free):
        switches = {name: True for name in ("auto_active", "keep_busy") if name not in said}
        config = dataclasses.replace(config, **switches)  # type: ignore[arg-type]
    if max_staleness == "auto":
        config = dataclasses.replace(config, auto_staleness=True)
    active = active_workers if isinstance(active_workers, int) else max(1, (workers + 1) // 2)
    if not 1 <= active <= workers:
        raise ConfigurationError(
            f"active_workers={active} must be between 1 and the number of workers, {workers}"
        )
    tau = max_staleness if isinstance(max_staleness, int) else config.max_staleness
    return dataclasses.replace(config, active_workers=active, max_staleness=tau)
