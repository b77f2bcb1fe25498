"""A student becomes a space of blocks and arms.

The space itself holds identities only. The texts (instructions, words, demos) stay in a ``ProgramSpace``, in
this process.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from asyndbt_dspy.core.space import Arm, Block, Space
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.programs.labels import enumerated_field, enumeration
from asyndbt_dspy.programs.program_space import Content, DemoEnding, DemoItem, DemoOrder, ProgramSpace

__all__ = ["DemoItem", "FragmentSlots", "ProgramSpace", "build_space", "demo_slots", "enumerated_field"]


@dataclass(frozen=True)
class FragmentSlots:
    """The paper's lower level: words appended to the instructions as a note.

    Attributes:
        slots: Number of slots per predictor (``M`` in the paper, 75), at least 1.
        vocabulary: The words of each slot (``N`` in the paper, 100), at least one. Arm 0 of a slot is no
            word.
        predictors: Names of the predictors that get fragment slots; ``None`` for all.
    """

    slots: int
    vocabulary: Sequence[str]
    predictors: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.slots < 1 or not self.vocabulary:
            raise ConfigurationError(
                f"fragment slots need slots >= 1 and a non-empty vocabulary, got slots={self.slots} and "
                f"{len(self.vocabulary)} words; leave fragments out to optimize without them"
            )


def build_space(
    student: dspy.Module,
    *,
    instructions: Mapping[str, Sequence[str]] | None = None,
    demos: Sequence[DemoItem] = (),
    slots: Mapping[str, Sequence[str | None]] | None = None,
    fragments: FragmentSlots | None = None,
    search_order: bool = False,
    endings: Mapping[str, DemoEnding] | None = None,
    later: Mapping[str, int] | None = None,
) -> ProgramSpace:
    """The blocks and arms of ``student``: lower-level blocks of all predictors first, then their demo slots.

    Args:
        student: Never changed.
        instructions: Per predictor, alternatives to the student's own text, which becomes arm 0. Repeats and
            blank texts are dropped. A predictor without alternatives gets a block with arm 0 alone.
        demos: The demo arms of all workers. A slot of class ``c`` offers the demos of stratum ``c``, a free
            slot all of them.
        slots: Per predictor, one entry per demo slot: a class, or ``None`` for a free slot (see
            ``demo_slots``).
        fragments: Word slots of the paper, ``None`` for none.
        search_order: Whether the order of the demo slots is a choice too (see ``demo_orders``).
        endings: Per predictor, how its demos may end besides as the adapter shows them (see ``endings``).
        later: Per predictor, how many instruction arms join during the run; they have no text yet.

    Raises:
        ConfigurationError: a name that is no predictor of the student, or two different demos of one key.
    """
    predictors = dict(student.named_predictors())
    instructions, slots, endings, later = instructions or {}, slots or {}, endings or {}, later or {}
    named = (
        *instructions,
        *slots,
        *endings,
        *later,
        *(item.predictor for item in demos),
        *((fragments and fragments.predictors) or ()),
    )
    _check_names(named, predictors)
    _check_keys(demos)
    lower: list[tuple[Block, list[Content]]] = []
    upper: list[tuple[Block, list[Content]]] = []
    for name, predictor in predictors.items():
        texts, late = instructions.get(name, ()), later.get(name, 0)
        lower.append(_instruction_block(name, predictor.signature.instructions, texts, late))
        if fragments is not None and (fragments.predictors is None or name in fragments.predictors):
            lower.extend(_fragment_blocks(name, fragments))
        own = _unrepeated(item for item in demos if item.predictor == name)
        upper.extend(_demo_blocks(name, slots.get(name, ()), own))
        if search_order and own and len(slots.get(name, ())) > 1:
            upper.append(_order_block(name, slots[name]))
        if name in endings and own and slots.get(name):
            arms = (Arm(""), Arm(f"e:{name}"))
            upper.append((Block(f"{name}/ending", name, "ending", arms), [None, endings[name]]))
    pairs = lower + upper
    return ProgramSpace(
        student, Space(tuple(block for block, _ in pairs)), [contents for _, contents in pairs]
    )


def demo_slots(
    student: dspy.Module, *, demos_per_class: int | None = None, demo_slots: int = 4, max_classes: int = 12
) -> Mapping[str, tuple[str | None, ...]]:
    """The demo slots of each predictor: one group per class where its last enumerated output has classes,
    else free ones.

    Args:
        student: The program.
        demos_per_class: Slots per class, 0 or more; ``None``: as many as make about ``demo_slots`` in all, at least one.
            The slots cycle through the classes.
        demo_slots: Free slots of a predictor without enumerated output, 0 or more.
        max_classes: A predictor with more classes than this gets free slots.

    Raises:
        ConfigurationError: a negative number.
    """
    settings = (
        ("demos_per_class", demos_per_class),
        ("demo_slots", demo_slots),
        ("max_classes", max_classes),
    )
    for setting, value in settings:
        if value is not None and value < 0:
            raise ConfigurationError(f"{setting} must be 0 or more, got {value}")
    found: dict[str, tuple[str | None, ...]] = {}
    for name, predictor in student.named_predictors():
        classes = enumeration(predictor.signature)
        if classes is not None and len(classes.labels) <= max_classes:
            each = demos_per_class
            if each is None:
                each = max(1, round(demo_slots / len(classes.labels)))
            found[name] = classes.labels * each
        else:
            found[name] = (None,) * demo_slots
    return found


def _instruction_block(
    name: str, student_text: str, texts: Sequence[str], late: int
) -> tuple[Block, list[Content]]:
    distinct = [student_text]
    for text in map(inspect.cleandoc, texts):
        if text.strip() and text.strip() not in (known.strip() for known in distinct):
            distinct.append(text)
    arms = (Arm(""), *(Arm(f"i:{name}:{number}") for number in range(1, len(distinct) + late)))
    block = Block(f"{name}/instructions", name, "instructions", arms, late=late)
    return block, [*distinct, *[None] * late]


def _fragment_blocks(name: str, fragments: FragmentSlots) -> list[tuple[Block, list[Content]]]:
    words = list(dict.fromkeys(fragments.vocabulary))
    # One key per word, whatever the slot: what is learned about a word is shared between slots.
    arms = (Arm(""), *(Arm(f"f:{name}:{number}") for number in range(1, len(words) + 1)))
    return [
        (Block(f"{name}/fragments/{slot}", name, "fragment", arms), [None, *words])
        for slot in range(fragments.slots)
    ]


def _demo_blocks(
    name: str, slots: Sequence[str | None], demos: Sequence[DemoItem]
) -> list[tuple[Block, list[Content]]]:
    blocks: list[tuple[Block, list[Content]]] = []
    used: dict[str | None, int] = {}
    for stratum in slots:
        number = used[stratum] = used.get(stratum, -1) + 1
        offered = [item for item in demos if stratum is None or item.stratum == stratum]
        arms = (Arm(""), *(Arm(item.key, item.home, item.shared) for item in offered))
        path = f"{number}" if stratum is None else f"{stratum}/{number}"
        blocks.append((Block(f"{name}/demos/{path}", name, "demo", arms, stratum), [None, *offered]))
    return blocks


MAX_ORDERS = 36
"""Arms of an order block. So many tell apart which class comes first and which last for up to six classes."""


def demo_orders(slots: Sequence[str | None]) -> list[tuple[int, ...]]:
    """Orders of demo slots worth telling apart, that of the slots first; at most ``MAX_ORDERS``.

    Every pair of classes comes first and last once where there is room, then the rotations, forwards and backwards, and
    those with equal classes side by side. Two orders that show the classes in one sequence count as one.
    """
    plain = tuple(range(len(slots)))
    grouped = tuple(sorted(plain, key=lambda number: slots.index(slots[number])))
    turned = [
        (*base[start:], *base[:start])
        for base in (plain, grouped, plain[::-1], grouped[::-1])
        for start in plain
    ]
    ends = [_between(plain, first, last) for first in plain for last in plain if first != last]
    wanted = [plain, *ends, *turned] if len(ends) < MAX_ORDERS else turned
    found: dict[tuple[str | int, ...], tuple[int, ...]] = {}
    for order in wanted:
        shown = tuple(slots[number] or number for number in order)
        found.setdefault(shown, order)
    return list(found.values())[:MAX_ORDERS]


def _between(slots: Sequence[int], first: int, last: int) -> tuple[int, ...]:
    return (first, *(slot for slot in slots if slot not in (first, last)), last)


def _order_block(name: str, slots: Sequence[str | None]) -> tuple[Block, list[Content]]:
    orders = demo_orders(slots)
    arms = (
        Arm(""),
        *(Arm(f"o:{name}:{','.join(map(str, order))}", order=order) for order in orders[1:]),
    )
    return Block(f"{name}/order", name, "order", arms), [None, *map(DemoOrder, orders[1:])]


def _unrepeated(items: Iterable[DemoItem]) -> list[DemoItem]:
    return list({item.key: item for item in items}.values())


def _check_names(named: Iterable[str], predictors: Mapping[str, Any]) -> None:
    unknown = sorted(set(named) - set(predictors))
    if unknown:
        raise ConfigurationError(
            f"no predictor of that name: {unknown}; the student's predictors are {list(predictors)}"
        )


def _check_keys(demos: Sequence[DemoItem]) -> None:
    seen: dict[str, DemoItem] = {}
    for item in demos:
        first = seen.setdefault(item.key, item)
        if first.predictor != item.predictor or first.demo != item.demo:
            raise ConfigurationError(f"two different demos have the key {item.key!r}; give each its own key")
