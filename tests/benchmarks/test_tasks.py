"""Programs of several predictors: each hands on what it wrote, called from threads or from a loop."""

from __future__ import annotations

import asyncio
import json
import re

import dspy
import pytest
from quality_bench import measure, tasks

from asyndbt_dspy.lms.scripted import scripted_lm

OF_TWO = [one for one in tasks.TASKS.values() if one.predictors == 2]


@pytest.mark.parametrize("task", OF_TWO, ids=lambda task: task.name)
def test_the_second_predictor_reads_what_the_first_one_wrote(task: tasks.Task) -> None:
    read: list[str] = []

    def script(messages: list[dict[str, str]]) -> str:
        read.append(messages[-1]["content"])
        asked = re.findall(r"`(\w+)`", read[-1].rsplit("Respond with", 1)[-1])
        return json.dumps({name: task.labels[-1] if name == "label" else "a few words" for name in asked})

    [example] = measure.made_examples(task, 1, 0).train
    program = task.build()
    with dspy.context(lm=scripted_lm(script), adapter=dspy.JSONAdapter()):
        found = [program(**example.inputs()), asyncio.run(program.acall(**example.inputs()))]
    assert [one.label for one in found] == [task.labels[-1]] * 2
    assert ["a few words" in one for one in read] == [False, True] * 2
    assert all("example 0" in one for one in read)
    assert len(program.named_predictors()) == task.predictors
