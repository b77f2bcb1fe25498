"""The contents of arms, and the way back from a candidate to a program."""

from __future__ import annotations

import functools
import inspect
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import dspy
from dspy.adapters.utils import serialize_for_json

from asyndbt_dspy.core.space import Block, Candidate, Space
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.programs.copies import copy_program, shared_parts

WITHHELD = "(withheld: a demo of a private worker)"
BUILT_PROGRAMS_KEPT = 32
"""How many programs ``ProgramSpace.build`` keeps for reuse: about the candidates in flight at one time."""

Source = Literal["labelled", "bootstrapped", "corrected"]


@dataclass(frozen=True)
class DemoItem:
    """The content of one demo arm. It stays in this process.

    Attributes:
        key: Unique per (predictor, content), for instance ``"d:eu:classify:17"``.
        home: Name of the worker whose shard it came from.
        shared: False for workers with ``share_demos=False``.
        predictor: Name in ``named_predictors()``.
        demo: Fields of the predictor's signature; ``augmented=True`` on those of a trace.
        stratum: The class it shows, where the predictor's last enumerated output has one, else ``None``.
        tokens: Estimated length in tokens, at least 0.
        source: Whether it is a labelled example, a trace of a run, or a trace with the example's labels as answer.
        example_index: Index of the example in its worker's shard, where known. A program that shows an
            example must not be scored on it: see ``ProgramSpace.shown_examples``.
    """

    key: str
    home: str
    shared: bool
    predictor: str
    demo: dspy.Example
    stratum: str | None
    tokens: int
    source: Source
    example_index: int | None = None

    @functools.cached_property
    def text(self) -> str:
        """See ``demo_text``."""
        return demo_text(self.demo)


@dataclass(frozen=True)
class DemoOrder:
    """An order of a predictor's demo slots.

    Attributes:
        slots: All slot numbers, the one shown first first.
    """

    slots: tuple[int, ...]


@dataclass(frozen=True)
class DemoEnding:
    """How the turn that is to be answered ends, for demos that are to end like it (see ``programs.endings``).

    Attributes:
        field: The predictor's last input, which is what stands last in a demo's turn.
        text: What the adapter adds to the last turn alone.
    """

    field: str
    text: str

    def on(self, demo: dspy.Example) -> dspy.Example:
        """A copy of ``demo`` that ends so; unchanged where the field is no text."""
        changed = demo.copy()
        if isinstance(demo.get(self.field), str):
            changed[self.field] = demo[self.field] + self.text
        return changed


Content = str | DemoItem | DemoOrder | DemoEnding | None
"""What an arm stands for: an instruction text, a word, a demo, an order, an ending, or nothing (arm 0 of all but
instructions)."""


class ProgramSpace:
    """All programs that can be made of one student, and the way back from a candidate to a program.

    Made by ``slots.build_space``. Safe to use from several threads.

    Attributes:
        space: Blocks and arms, without any text.
    """

    def __init__(self, student: dspy.Module, space: Space, contents: Sequence[Sequence[Content]]) -> None:
        self.space = space
        # Our own copy: the user may go on to change the student while an optimization of it runs.
        self._shared = shared_parts(student)
        self._student = copy_program(student, self._shared)
        self._contents = tuple(list(block) for block in contents)
        self._built: OrderedDict[Candidate, dspy.Module] = OrderedDict()
        self._lock = threading.Lock()
        self._blocks_of: dict[str, list[int]] = {}
        for index, block in enumerate(space.blocks):
            self._blocks_of.setdefault(block.predictor, []).append(index)

    def build(self, candidate: Sequence[int], *, fresh: bool = False) -> dspy.Module:
        """The program that ``candidate`` stands for: a deep copy of the student with other instructions and
        demos.

        The copy's predictors share the student's LM objects. Runs of one built program may overlap. Recent
        programs are kept and returned again.

        Args:
            candidate: One arm per block of ``space``. ``space.student`` gives an exact copy of the student.
            fresh: Return a new object that nobody else holds (for a program that is handed to the user or
                changed).

        Raises:
            ConfigurationError: the candidate does not fit the space.
        """
        chosen = self.space.check(candidate)
        if fresh:
            return self._assemble(chosen)
        with self._lock:
            program = self._built.pop(chosen, None)
            if program is None:
                program = self._assemble(chosen)
            self._built[chosen] = program
            while len(self._built) > BUILT_PROGRAMS_KEPT:
                self._built.popitem(last=False)
            return program

    def describe(self, candidate: Sequence[int], *, reveal_private: bool = False) -> dict[str, Any]:
        """What ``candidate`` changes, as plain JSON: ``{predictor: {"instructions": str, "demos":
        [fields]}}``.

        A private worker's demo appears as ``{"withheld": …}`` unless ``reveal_private``: descriptions end up
        in results and logs.
        """
        chosen = self.space.check(candidate)
        described: dict[str, Any] = {}
        for name, predictor in self._student.named_predictors():
            items, ending = self._demos(name, chosen), self._ending(name, chosen)
            demos = [_described(item, ending, reveal_private) for item in items]
            if not items:
                demos = [_plain(demo) for demo in predictor.demos]
            described[name] = {"instructions": self._instructions(name, predictor, chosen), "demos": demos}
        return described

    def allowed(self, worker: str, pool: Literal["own", "all"]) -> tuple[tuple[int, ...], ...]:
        """Per upper-level block, the arms that ``worker`` may draw; arm 0 is always among them.

        Args:
            worker: Name of the worker.
            pool: ``"own"``: demos of the worker's own shard; a block without any is filled with what others
                share. ``"all"``: its own demos and everything that others share. Private demos of others are
                in neither.
        """
        if pool not in ("own", "all"):
            raise ConfigurationError(f"pool must be 'own' or 'all', got {pool!r}")
        return tuple(_allowed_arms(block, worker, pool) for block in self.space.upper)

    def fill(self, block_index: int, arm: int, text: str) -> None:
        """Give an arm that joins during the run its text, before any candidate has it.

        Raises:
            ConfigurationError: the arm is no late one of an instruction block, or has another text already.
        """
        block = self.space.blocks[block_index]
        known = self._contents[block_index][arm] if 0 <= arm < len(block.arms) else ""
        if arm < len(block.arms) - block.late or known not in (None, text):
            raise ConfigurationError(
                f"arm {arm} of block {block.name!r} is not one of its {block.late} late arms without a text"
            )
        self._contents[block_index][arm] = text

    def content(self, block_index: int, arm: int) -> Content:
        """What an arm stands for, a private worker's demos included: not for messages or logs."""
        return self._contents[block_index][arm]

    def arm_text(self, block_index: int, arm: int, *, reveal_private: bool = False) -> str:
        """The text of one arm: instructions, word, or the demo's fields, one a line; empty for an empty slot.

        A private worker's demo is withheld unless ``reveal_private``.
        """
        if not 0 <= block_index < len(self._contents):
            raise ConfigurationError(f"the space has blocks 0..{len(self._contents) - 1}, got {block_index}")
        contents = self._contents[block_index]
        if not 0 <= arm < len(contents):
            name = self.space.blocks[block_index].name
            raise ConfigurationError(f"block {name!r} has arms 0..{len(contents) - 1}, got {arm}")
        content = contents[arm]
        if isinstance(content, DemoOrder):
            return f"demo slots in the order {', '.join(map(str, content.slots))}"
        if isinstance(content, DemoEnding):
            return f"demos end like the last turn: {content.text.strip()}"
        if not isinstance(content, DemoItem):
            return content or ""
        if not content.shared and not reveal_private:
            return WITHHELD
        return "\n".join(f"{field}: {value}" for field, value in _plain(content.demo).items())

    def shown_examples(self, candidate: Sequence[int], worker: str) -> frozenset[int]:
        """Indices of the examples of ``worker``'s shard that ``candidate`` shows as demos.

        Scoring the candidate on one of them would reward copying the answer.
        """
        chosen = self.space.check(candidate)
        items = (content[arm] for content, arm in zip(self._contents, chosen, strict=True))
        return frozenset(
            item.example_index
            for item in items
            if isinstance(item, DemoItem) and item.home == worker and item.example_index is not None
        )

    def _assemble(self, candidate: Candidate) -> dspy.Module:
        program = copy_program(self._student, self._shared)
        if candidate == self.space.student:
            return program
        for name, predictor in program.named_predictors():
            text = self._instructions(name, predictor, candidate)
            if text != predictor.signature.instructions:
                predictor.signature = predictor.signature.with_instructions(text)
            items = self._demos(name, candidate)
            if items:
                # Each program gets its own Example objects: a program that changes its demos must not change
                # an arm.
                predictor.demos = [_shown(item.demo, self._ending(name, candidate)) for item in items]
        return program

    def _instructions(self, name: str, predictor: dspy.Predict, candidate: Candidate) -> str:
        text: str = predictor.signature.instructions
        words: list[str] = []
        for index in self._blocks_of.get(name, ()):
            block, arm = self.space.blocks[index], candidate[index]
            content = self._contents[index][arm]
            if block.kind == "instructions" and arm > 0 and content is not None:
                text = str(content)
            elif block.kind == "fragment" and content is not None:
                words.append(str(content))
        if words:
            note = "Note: " + " ".join(words)
            text = f"{text}\n{note}" if text else note
        # What a signature makes of its instructions, so that descriptions say what is built.
        return inspect.cleandoc(text)

    def _ending(self, name: str, candidate: Candidate) -> DemoEnding | None:
        """How the predictor's demos end, ``None`` for as the adapter shows them."""
        chosen = (self._contents[index][candidate[index]] for index in self._blocks_of.get(name, ()))
        return next((content for content in chosen if isinstance(content, DemoEnding)), None)

    def _demos(self, name: str, candidate: Candidate) -> list[DemoItem]:
        """The demos of one predictor in the order chosen; a demo that fills two slots is shown once."""
        chosen = [self._contents[index][candidate[index]] for index in self._blocks_of.get(name, ())]
        slots = [
            self._contents[index][candidate[index]]
            for index in self._blocks_of.get(name, ())
            if self.space.blocks[index].kind == "demo"
        ]
        order = next(
            (content.slots for content in chosen if isinstance(content, DemoOrder)), range(len(slots))
        )
        items: list[DemoItem] = []
        for item in (slots[number] for number in order):
            if isinstance(item, DemoItem) and not any(
                item.key == kept.key or item.text == kept.text for kept in items
            ):
                items.append(item)
        return items


def _shown(demo: dspy.Example, ending: DemoEnding | None) -> dspy.Example:
    return demo.copy() if ending is None else ending.on(demo)


def _allowed_arms(block: Block, worker: str, pool: Literal["own", "all"]) -> tuple[int, ...]:
    own = [number for number, arm in enumerate(block.arms) if number and arm.home == worker]
    if pool == "own" and own:
        return (0, *own)
    return (
        0,
        *(number for number, arm in enumerate(block.arms) if number and (arm.shared or arm.home == worker)),
    )


def _described(item: DemoItem, ending: DemoEnding | None, reveal_private: bool) -> dict[str, Any]:
    if item.shared or reveal_private:
        return _plain(_shown(item.demo, ending))
    return {"withheld": WITHHELD}


def demo_text(demo: dspy.Example) -> str:
    """Equal for demos that read the same, but for the order of keys. Values need not be comparable: arrays are not."""
    return json.dumps(_plain(demo), sort_keys=True, ensure_ascii=False, default=str)


def _plain(demo: Mapping[str, Any] | dspy.Example) -> dict[str, Any]:
    # `augmented` is DSPy's mark of a bootstrapped demo, not a field of it.
    fields = dict(demo.items())
    return {name: serialize_for_json(value) for name, value in fields.items() if name != "augmented"}
