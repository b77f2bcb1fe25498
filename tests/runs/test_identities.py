"""What makes two metrics or two programs the same, and what does not."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from crashes import compiled
from pydantic import BaseModel

from asyndbt_dspy import Budget
from asyndbt_dspy.deploy.fingerprints import sha256_of
from asyndbt_dspy.errors import ResumeError
from asyndbt_dspy.recording.identities import code_identity, digest, structure_identity
from asyndbt_dspy.recording.rollout_keys import RolloutKeys


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield


class Colour(enum.Enum):
    RED = 1
    GREEN = 2


@dataclasses.dataclass
class Limits:
    most: int


class Settings(BaseModel):
    most: int


class Judge:
    """A metric as a method, whose object says how strict it is."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def score(self, gold: Any, said: Any) -> float:
        return float(gold.label == said.label) * float(self.weight)


class PrivateJudge:
    """A callable metric with a private setting."""

    def __init__(self, weight: Any) -> None:
        self._weight = weight

    def __call__(self, gold: Any, said: Any) -> float:
        return float(gold.label == said.label) * float(self._weight)


class SlottedJudge:
    __slots__ = ("_weight",)

    def __init__(self, weight: Any) -> None:
        self._weight = weight

    def __call__(self, gold: Any, said: Any) -> float:
        return float(self._weight)


class ModuleJudge(dspy.Module):
    """A metric that asks an LM."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.grade = dspy.Predict(kit.Sort.with_instructions(text))

    def forward(self, gold: Any, said: Any) -> float:
        return float(self.grade.signature.instructions == "one")


class Wrapper:
    """A metric around another one."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def __call__(self, gold: Any, said: Any) -> float:
        return float(self._metric(gold, said))


class Program(dspy.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.predict = dspy.Predict(kit.Sort)
        for name, value in attributes.items():
            setattr(self, name, value)


def closing_over(value: Any) -> Callable[..., Any]:
    def metric(gold: Any, said: Any) -> Any:
        return value

    return metric


def with_keyword(value: Any) -> Callable[..., Any]:
    def metric(gold: Any, said: Any, *, threshold: Any = value) -> Any:
        return threshold

    return metric


def with_demo(label: str) -> ModuleJudge:
    judge = ModuleJudge("one")
    judge.grade.demos = [dspy.Example(message="m", label=label)]
    return judge


def with_lm(model: str) -> ModuleJudge:
    judge = ModuleJudge("one")
    judge.grade.lm = dspy.LM(f"openai/{model}", api_key="k")
    return judge


VALUES: dict[str, tuple[Any, Any]] = {
    "number": (1, 2),
    "set": ({"a"}, {"b"}),
    "half a character": ({"\ud83d"}, {"\ude00"}),
    "frozenset": (frozenset({"a"}), frozenset({"b"})),
    "pattern": (re.compile("a"), re.compile("b")),
    "flags": (re.compile("a"), re.compile("a", re.IGNORECASE)),
    "bytes": (b"a", b"b"),
    "enum": (Colour.RED, Colour.GREEN),
    "decimal": (Decimal("0.1"), Decimal("0.2")),
    "date": (datetime.date(2024, 1, 1), datetime.date(2024, 1, 2)),
    "dataclass": (Limits(1), Limits(2)),
    "pydantic": (Settings(most=1), Settings(most=2)),
    "example": (dspy.Example(a=1), dspy.Example(a=2)),
    "nested": ({"a": [{1}]}, {"a": [{2}]}),
}


@pytest.mark.parametrize("name", VALUES)
def test_settings_tell_metrics_and_programs_apart_wherever_they_are_held(name: str) -> None:
    holders: list[Callable[[Any], Any]] = [
        lambda value: code_identity(closing_over(value)),
        lambda value: code_identity(with_keyword(value)),
        lambda value: code_identity(functools.partial(kit.metric, option=value)),
        lambda value: code_identity(Judge(value).score),
        lambda value: code_identity(PrivateJudge(value)),
        lambda value: code_identity(SlottedJudge(value)),
        lambda value: code_identity(Wrapper(closing_over(value))),
        lambda value: code_identity(functools.lru_cache(closing_over(value))),
        lambda value: structure_identity(Program(setting=value)),
        lambda value: structure_identity(Program(_setting=value)),
        lambda value: structure_identity(Program(tool=Judge(value).score)),
    ]
    one, other = VALUES[name]
    for holder in holders:
        assert digest(holder(one)) == digest(holder(one)) != digest(holder(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ModuleJudge("one"), ModuleJudge("two")),
        (with_demo("red"), with_demo("blue")),
        (with_lm("m"), with_lm("n")),
    ],
    ids=["instructions", "demos", "lm"],
)
def test_of_a_metric_that_asks_an_lm_what_it_asks_counts(one: ModuleJudge, other: ModuleJudge) -> None:
    for holder in (lambda judge: judge, closing_over, Wrapper, lambda judge: judge.forward):
        assert digest(code_identity(holder(one))) != digest(code_identity(holder(other)))


def test_what_a_run_leaves_in_a_metric_or_a_program_is_no_other_one() -> None:
    judge, program = ModuleJudge("one"), Program(_client=None, _answers={}, _lock=threading.Lock())
    before = digest([code_identity(judge), structure_identity(program)])
    for module in (judge, program):
        module.history.append({"prompt": "p"})
        module.callbacks.append(object())
        module._compiled = True
    judge.grade.traces.append(object())
    program._client = object()
    program._answers["item 1"] = dspy.Prediction(label=object())
    program._api_key = "rotated"
    assert digest([code_identity(judge), structure_identity(program)]) == before


def test_a_value_that_is_made_once_and_kept_is_no_setting() -> None:
    class Lazy:
        def __call__(self, gold: Any, said: Any) -> float:
            return self.table[1]

        @functools.cached_property
        def table(self) -> dict[int, float]:
            return {1: 1.0}

    metric = Lazy()
    before = digest(code_identity(metric))
    metric(None, None)
    assert digest(code_identity(metric)) == before


def test_objects_that_hold_each_other_have_an_identity() -> None:
    judge = Judge(1.0)
    judge.again = [judge.score, judge, {"self": judge}]  # type: ignore[attr-defined]
    endless: list[Any] = []
    endless.append(endless)
    wrapper = Wrapper(None)
    wrapper._metric = wrapper
    module = ModuleJudge("one")
    module.tool = closing_over(module)
    for metric in (judge.score, PrivateJudge(endless), wrapper, module):
        assert digest(code_identity(metric)) == digest(code_identity(metric))


def test_a_set_is_the_same_in_every_process() -> None:
    code = (
        "from asyndbt_dspy.recording.identities import code_identity, digest\n"
        "def close(found, keyed):\n    return lambda gold, said: (found, keyed)\n"
        "words = {'red', 'green', 'blue', 'pink'}\n"
        "print(digest(code_identity(close(words, {frozenset(words): 1}))[2:]))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def plain(gold: Any, said: Any, weight: float = 0.5) -> float:
    return weight


class Limited(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.most, self.words, self.helper = 3, {"a": ["b", 1.5]}, plain
        self.react = dspy.ReAct(kit.Sort, tools=[self.look_up])

    def look_up(self, word: str) -> str:
        return word


def test_identities_that_old_run_dirs_hold_stay_as_they_are() -> None:
    source = "def plain(gold: Any, said: Any, weight: float = 0.5) -> float:\n    return weight\n"
    function = [f"{__name__}.plain", sha256_of(source.encode()), ["0.5"], []]
    assert code_identity(plain) == function
    chained = [[path, *rest] for path, *rest in structure_identity(dspy.ChainOfThought(kit.Sort))]
    assert chained == [
        ["self", ["dspy.predict.chain_of_thought.ChainOfThought", "library"], {"predict": "Predict"}],
        ["self.predict", ["dspy.predict.predict.Predict", "library"], {"config": [], "fields": []}],
    ]
    (path, _, state), (_, _, react), *_ = structure_identity(Limited())
    assert path == "self"
    assert state == {
        "helper": function,
        "most": 3,
        "react": "ReAct",
        "words": [["a", ["b", "1.5"]]],
    }
    assert react["tools"][0][1][:2] == ["tool", "look_up"]
    assert react["tools"][0][1][2][0] == "method" and react["tools"][0][1][2][2] == "Limited"


def test_candidates_are_told_apart_by_no_counter_that_they_share() -> None:
    class Search:
        """A tool that cannot be copied and counts."""

        def __init__(self) -> None:
            self.calls, self._found, self._lock = 0, {"": 0}, threading.Lock()

        def __call__(self, word: str) -> str:
            self.calls += 1
            self._found[word] = self.calls
            return word

    search, lm, example = Search(), kit.scripted_lm(kit.stairs(1)), kit.example(1)
    keys = RolloutKeys("scope")
    first = keys.key(lm, Program(search=search), example).digest
    search("red")
    assert keys.key(lm, Program(search=search), example).digest == first
    assert RolloutKeys("scope").key(lm, Program(search=Search()), example).digest == first
    counting = Program(count=0)
    before = keys.key(lm, counting, example).digest
    counting.count += 1
    other = kit.scripted_lm(kit.stairs(1))
    assert keys.key(other, counting, example).digest == before, "another worker's LM of the same kind"


@pytest.mark.parametrize("make", [lambda weight: Judge(weight).score, PrivateJudge])
def test_a_run_with_another_setting_of_the_metric_is_refused(tmp_path: Path, make: Any) -> None:
    options: dict[str, Any] = {"budget": Budget(metric_calls=60)}
    compiled(tmp_path, kit.stairs(1), metric=make(1.0), **options)
    with pytest.raises(ResumeError, match="the metric"):
        compiled(tmp_path, kit.stairs(1), metric=make(0.25), **options)
    compiled(tmp_path, kit.stairs(1), metric=make(1.0), **options)


SETS = """
import dspy
from asyndbt_dspy.deploy.fingerprints import data_record
from asyndbt_dspy.recording.identities import example_digest
tags = {"red", "green", "blue", "black", "white"}
example = dspy.Example(tags=tags, nested=[{"more": frozenset(tags)}], label="a").with_inputs("tags")
print(example_digest(example), data_record([example])["sha256"])
"""


def test_examples_with_sets_are_the_same_in_every_process() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", SETS],
            env={**os.environ, "PYTHONHASHSEED": seed, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1
