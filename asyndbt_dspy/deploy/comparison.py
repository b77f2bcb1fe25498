"""What differs between two artifacts: instructions word by word, demos, scores."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyndbt_dspy.deploy.artifact import Artifact, read_artifact


@dataclass(frozen=True)
class InstructionChange:
    """One predictor's instructions: (kind, text) with kind ``"same"``, ``"removed"`` or ``"added"``."""

    predictor: str
    words: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        marks = {"same": "{}", "removed": "[-{}-]", "added": "{{+{}+}}"}
        return "".join(marks[kind].format(text) for kind, text in self.words)


@dataclass(frozen=True)
class DemoChange:
    """One predictor's demos: those that left, those that came, and whether the kept ones changed order."""

    predictor: str
    removed: tuple[Mapping[str, Any], ...]
    added: tuple[Mapping[str, Any], ...]
    reordered: bool


@dataclass(frozen=True)
class ArtifactDiff:
    """What differs from ``a`` to ``b``. Falsy where nothing does; ``str()`` is for people.

    Attributes:
        instructions: Predictors whose instructions differ.
        demos: Predictors whose demos differ.
        scores: Score name -> (in a, in b), where they differ.
        other: Signature, LMs, adapter and versions that differ, one sentence each.
    """

    instructions: tuple[InstructionChange, ...]
    demos: tuple[DemoChange, ...]
    scores: Mapping[str, tuple[Any, Any]]
    other: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.instructions or self.demos or self.scores or self.other)

    def __str__(self) -> str:
        if not self:
            return "no difference"
        lines: list[str] = []
        for change in self.instructions:
            lines += [f"instructions of {change.predictor}:", f"  {change}"]
        for demos in self.demos:
            lines.append(f"demos of {demos.predictor}:" + (" (order changed)" if demos.reordered else ""))
            lines += [f"  - {json.dumps(demo, ensure_ascii=False)}" for demo in demos.removed]
            lines += [f"  + {json.dumps(demo, ensure_ascii=False)}" for demo in demos.added]
        lines += [f"{name}: {old} -> {new}" for name, (old, new) in self.scores.items()]
        return "\n".join([*lines, *self.other])


def diff(a: str | os.PathLike[str] | Artifact, b: str | os.PathLike[str] | Artifact) -> ArtifactDiff:
    """What differs from artifact ``a`` to artifact ``b``.

    Raises:
        ArtifactError: one of them cannot be read.
    """
    old = a if isinstance(a, Artifact) else read_artifact(a)
    new = b if isinstance(b, Artifact) else read_artifact(b)
    common = [name for name in old.state if name in new.state]
    instructions = (_instructions(name, old.state[name], new.state[name]) for name in common)
    demos = (_demos(name, old.state[name]["demos"], new.state[name]["demos"]) for name in common)
    return ArtifactDiff(
        tuple(change for change in instructions if change is not None),
        tuple(change for change in demos if change is not None),
        _scores(old.manifest.get("scores") or {}, new.manifest.get("scores") or {}),
        tuple(_other(old.manifest, new.manifest)),
    )


def word_changes(old: str, new: str) -> tuple[tuple[str, str], ...]:
    """(kind, text) pieces; the ``same`` and ``removed`` ones make ``old``, ``same`` and ``added`` make ``new``."""
    before, after = re.findall(r"\s+|\S+", old), re.findall(r"\s+|\S+", new)
    pieces: list[tuple[str, str]] = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(before[i1:i2])))
            continue
        pieces += [("removed", "".join(before[i1:i2])), ("added", "".join(after[j1:j2]))]
    return tuple((kind, text) for kind, text in pieces if text)


def _instructions(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> InstructionChange | None:
    before, after = old["signature"]["instructions"], new["signature"]["instructions"]
    return None if before == after else InstructionChange(name, word_changes(before, after))


def _demos(name: str, old: list[Any], new: list[Any]) -> DemoChange | None:
    if old == new:
        return None
    # Equal demos are matched one to one, so that a repeated demo counts as often as it is there.
    removed, kept, left = [], [], list(new)
    for demo in old:
        if demo in left:
            left.remove(demo)
            kept.append(demo)
        else:
            removed.append(demo)
    added = list(left)
    order = list(new)
    for demo in added:
        order.remove(demo)
    return DemoChange(name, tuple(removed), tuple(added), reordered=order != kept)


def _scores(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (old.get(name), new.get(name))
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    }


def _other(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    said = []
    if old["signature"] != new["signature"]:
        before, after = list(old["signature"]["predictors"]), list(new["signature"]["predictors"])
        said.append(
            f"signature: {before} -> {after}" if before != after else "signature: field names or types differ"
        )
    for key in ("adapter", "lms", "versions", "data"):
        if old.get(key) != new.get(key):
            said.append(f"{key}: {_compact(old.get(key))} -> {_compact(new.get(key))}")
    return said


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
