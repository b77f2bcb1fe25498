"""From a rollout's content to its key."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import dspy

from asyndbt_dspy.deploy.fingerprints import canonical_json
from asyndbt_dspy.lms.identity import is_deterministic, lm_identity
from asyndbt_dspy.programs.paid_rollouts import RolloutKey
from asyndbt_dspy.recording.identities import (
    FirstSeen,
    digest,
    example_digest,
    predictors_identity,
    structure_identity,
)


class RolloutKeys:
    """Keys of rollouts; a program and an example are hashed once each.

    Args:
        scope: What all rollouts of the run share (metric, failure score, prompt format, versions); strict JSON.
        noisy: Whether scores differ from time to time, whatever the LM.
    """

    def __init__(self, scope: Any, noisy: bool = False) -> None:
        self._noisy = noisy
        self._scope = digest(scope)
        self._programs: weakref.WeakKeyDictionary[dspy.Module, dict[int, tuple[Any, bytes, bool]]]
        self._programs = weakref.WeakKeyDictionary()
        # Once per program, however many LMs run it: what it holds may change as it runs.
        self._contents: weakref.WeakKeyDictionary[dspy.Module, list[Any]] = weakref.WeakKeyDictionary()
        self._first_seen = FirstSeen()
        # The examples are kept alive, so that none gets the address of another.
        self._examples: dict[int, tuple[dspy.Example, bytes]] = {}

    def key(self, lm: Any, program: dspy.Module, example: dspy.Example) -> RolloutKey:
        """See ``RolloutBook.key``. ``program`` must not change its instructions or demos any more."""
        content, is_repeatable = self._program(lm, program)
        found = self._examples.get(id(example))
        if found is None:
            found = self._examples[id(example)] = example, bytes.fromhex(example_digest(example))
        return RolloutKey(hashlib.sha256(content + found[1]).digest(), is_repeatable)

    def _program(self, lm: Any, program: dspy.Module) -> tuple[bytes, bool]:
        known = self._programs.setdefault(program, {})
        entry = known.get(id(lm))
        if entry is None or entry[0] is not lm:
            lms = [predictor.lm or lm for _, predictor in program.named_predictors()]
            own = self._contents.get(program)
            if own is None:
                own = self._contents[program] = [
                    structure_identity(program, self._first_seen),
                    predictors_identity(program),
                ]
            content = [self._scope, *own, [lm_identity(one) for one in lms]]
            settings = [getattr(predictor, "config", None) for _, predictor in program.named_predictors()]
            same = not self._noisy and all(
                is_deterministic(one, config) for one, config in zip(lms, settings, strict=True)
            )
            entry = known[id(lm)] = lm, hashlib.sha256(canonical_json(content)).digest(), same
        return entry[1], entry[2]
