"""Which outputs count as enumerations, and which label a value stands for."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal, Optional, Union

import dspy
import pytest

from asyndbt_dspy.programs.labels import enumeration, example_labels
from asyndbt_dspy.programs.slots import enumerated_field


class Colour(enum.Enum):
    RED = "red wine"
    BLUE = 2


class Size(str, enum.Enum):
    SMALL = "small"
    LARGE = "large"


def signature(annotation: Any) -> type[dspy.Signature]:
    return dspy.Signature("text -> note").append("label", dspy.OutputField(), type_=annotation)


@pytest.mark.parametrize(
    ("annotation", "labels"),
    [
        (Literal["a", "b"], ("a", "b")),
        (Literal[3, 1], ("3", "1")),
        (bool, ("True", "False")),
        (Colour, ("red wine", "2")),
        (Size, ("small", "large")),
        (Optional[Literal["a", "b"]], ("a", "b")),  # noqa: UP045 - the old spelling is what users write
        (Literal["a", "b"] | None, ("a", "b")),
        (Literal["a", "b", None], ("a", "b")),
        (Union[Literal["a"], Colour], ("a", "red wine", "2")),  # noqa: UP007
        (Annotated[Literal["a", "b"], "a note"], ("a", "b")),
        (bool | None, ("True", "False")),
        (Colour | None, ("red wine", "2")),
    ],
)
def test_enumerations(annotation: Any, labels: tuple[str, ...]) -> None:
    assert enumerated_field(signature(annotation)) == ("label", labels)


@pytest.mark.parametrize(
    "annotation", [str, int, list[Literal["a", "b"]], Literal["a", "b"] | str, Literal["only"]]
)
def test_open_outputs_are_no_enumerations(annotation: Any) -> None:
    assert enumerated_field(signature(annotation)) is None


def test_the_last_enumerated_output_counts() -> None:
    both = (
        signature(bool)
        .append("grade", dspy.OutputField(), type_=Literal["x", "y"])
        .append("remark", dspy.OutputField(), type_=str)
    )
    assert enumerated_field(both) == ("grade", ("x", "y"))


@pytest.mark.parametrize(
    ("annotation", "value", "label"),
    [
        (Literal["a", "b"], "a", "a"),
        (Literal["a", "b"], " A ", "a"),
        (Literal["a", "A"], "A", "A"),
        (Literal["a", "b"], "c", None),
        (Literal[1, 2], 2, "2"),
        (Literal[1, 2], "2", "2"),
        (bool, False, "False"),
        (bool, "true", "True"),
        (Colour, Colour.RED, "red wine"),
        (Colour, "RED", "red wine"),
        (Colour, 2, "2"),
        (Size, Size.LARGE, "large"),
        (bool | None, None, None),
    ],
)
def test_label_of(annotation: Any, value: Any, label: str | None) -> None:
    classes = enumeration(signature(annotation))
    assert classes is not None
    assert classes.label_of(value) == label


def test_example_labels_follow_the_last_predictor_that_has_them(
    kinds: Any, examples: list[dspy.Example]
) -> None:
    expected = ["billing", "access", "other"] * 2
    assert example_labels(kinds["nested"].make(), examples) == expected
    assert example_labels(kinds["react"].make(), examples) == expected
    assert example_labels(dspy.Predict("message -> answer"), examples) == [None] * 6
