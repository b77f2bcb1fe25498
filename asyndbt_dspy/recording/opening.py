"""From an optimizer and its data to the fingerprints of a run, and to the book that keeps its rollouts."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dspy

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.lms.identity import lm_identity
from asyndbt_dspy.programs.program_space import DemoEnding, DemoItem, DemoOrder, ProgramSpace
from asyndbt_dspy.recording.identities import (
    code_identity,
    code_name,
    data_identity,
    digest,
    example_digest,
    predictors_identity,
    structure_identity,
    versions,
)
from asyndbt_dspy.recording.recorder import KeysOnly, RunRecorder
from asyndbt_dspy.runs.run_directory import RunDirectory
from asyndbt_dspy.workers import Worker

if TYPE_CHECKING:
    from asyndbt_dspy.optimizer import AsynDBT

_LIKE_CODE = ("shard_key",)
_SETTINGS = (
    "preset",
    "seed",
    "deterministic",
    "rollout_timeout_s",
    "max_failures",
    "failure_score",
    "loss",
    "shard_key",
)


def open_book(
    optimizer: AsynDBT,
    student: dspy.Module,
    teacher: dspy.Module | None,
    workers: Sequence[Worker],
    valset: Sequence[dspy.Example] | None,
    config: AlgorithmConfig,
) -> KeysOnly:
    """The book of this run; with a ``run_dir`` a ``RunRecorder``, which the caller closes.

    Raises:
        ConfigurationError: a ``run_dir`` that cannot be used.
        JournalError: a ``run_dir`` in use, or a journal that cannot be read.
        ResumeError: the newest run is of something else.
    """
    from asyndbt_dspy import __version__  # the package's own __init__ is read by now

    scope = {
        "metric": code_identity(optimizer.metric),
        "failure_score": optimizer.failure_score,
        "adapter": _adapter_identity(),
        "versions": versions(),
        "package": __version__,
    }
    if optimizer.run_dir is None:
        return KeysOnly(scope, config.repeats)
    manifest = {
        "package": __version__,
        "budget": dataclasses.asdict(optimizer.budget),
        "fingerprints": fingerprints(optimizer, student, teacher, workers, valset, config),
    }
    directory = RunDirectory(os.fspath(optimizer.run_dir), resume=optimizer.resume, manifest=manifest)
    try:
        private = frozenset(worker.name for worker in workers if not worker.share_demos)
        names = [worker.name for worker in workers]
        return RunRecorder(directory, names, private, scope, fsync=optimizer.fsync, noisy=config.repeats)
    except BaseException:
        directory.close()
        raise


def fingerprints(
    optimizer: AsynDBT,
    student: dspy.Module,
    teacher: dspy.Module | None,
    workers: Sequence[Worker],
    valset: Sequence[dspy.Example] | None,
    config: AlgorithmConfig,
) -> dict[str, Any]:
    """What must be the same for a run to go on. Hashes and settings; no text of examples and no keys."""
    surrounding = dspy.settings.lm
    own_lms = [lm_identity(predictor.lm) for _, predictor in student.named_predictors()]
    return {
        "program": _program_digest(student),
        "teacher": None if teacher is None else _program_digest(teacher),
        "metric": f"{code_name(optimizer.metric)} {digest(code_identity(optimizer.metric))}",
        "adapter": digest(_adapter_identity()),
        "data": {
            worker.name: f"{data_identity(worker.shard)}; {data_identity(worker.valset or ())}"
            for worker in workers
        },
        "valset": data_identity(valset or ()),
        "workers": [worker.name for worker in workers],
        "lms": {worker.name: digest([_identity(worker.lms or [surrounding]), own_lms]) for worker in workers},
        "versions": versions(),
        "settings": {
            **{name: getattr(optimizer, name) for name in _SETTINGS if name not in _LIKE_CODE},
            "shard_key": None if optimizer.shard_key is None else digest(code_identity(optimizer.shard_key)),
            "options": _options(optimizer.options),
            "private_workers": [worker.name for worker in workers if not worker.share_demos],
            "config": _strict(config.to_dict()),
        },
    }


def space_digest(programs: ProgramSpace) -> tuple[str, list[list[Any]]]:
    """A hash of all blocks and what their arms stand for, and per block its name and number of arms.

    The demos of private workers count by their identity alone.
    """
    content = [
        [
            block.name,
            [[arm.key, _content(programs.content(place, one))] for one, arm in enumerate(block.arms)],
        ]
        for place, block in enumerate(programs.space.blocks)
    ]
    return digest(content), [[block.name, len(block.arms)] for block in programs.space.blocks]


def _content(content: Any) -> Any:
    if isinstance(content, DemoItem):
        return example_digest(content.demo) if content.shared else content.key
    return dataclasses.asdict(content) if isinstance(content, DemoOrder | DemoEnding) else content


def _strict(value: Any) -> Any:
    """Strict JSON: infinity as text, so that it is still told apart."""
    if isinstance(value, dict):
        return {name: _strict(one) for name, one in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _program_digest(program: dspy.Module) -> str:
    return digest([structure_identity(program), predictors_identity(program)])


def _adapter_identity() -> Any:
    adapter = dspy.settings.adapter
    return None if adapter is None else code_identity(adapter)


def _options(options: Any) -> dict[str, Any]:
    found = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    texts = found.pop("instructions")
    proposer = found.pop("proposer")
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in found.items()},
        "instructions": None if texts is None else digest({key: list(one) for key, one in texts.items()}),
        "proposer": None if proposer is None else digest(lm_identity(proposer)),
    }


def _identity(lms: Sequence[Any]) -> Any:
    return lm_identity(lms[0]) if len(lms) == 1 else [lm_identity(one) for one in lms]
