"""Nothing deterministic is paid for twice: within a run, and across the runs of one ``run_dir``."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from crashes import Asked, compiled, entries, steady

from asyndbt_dspy import Budget, Worker
from asyndbt_dspy.lms.fallback import fallback
from asyndbt_dspy.lms.identity import is_deterministic, lm_identity
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.lms.metered import metered
from asyndbt_dspy.recording.identities import code_identity, digest
from asyndbt_dspy.recording.rollout_keys import RolloutKeys


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield


def test_a_second_run_pays_for_nothing_and_decides_the_same(tmp_path: Path) -> None:
    asked = Asked(kit.stairs(1))
    first, program = compiled(tmp_path, None, lm=kit.greedy_lm(asked), resume=False)
    count = len(asked.prompts)
    second, same = compiled(tmp_path, None, lm=kit.greedy_lm(asked), resume=False)
    assert len(asked.prompts) == count > 80 and len(set(asked.prompts)) == count
    assert kit.state_of(same) == kit.state_of(program)
    assert first.result is not None and second.result is not None
    assert second.result.metric_calls == first.result.metric_calls, "the cache changes no decision"
    assert sum(row.lm_calls for row in second.result.workers) == 0
    assert len(entries(tmp_path, "rollout", run=2)) == len(entries(tmp_path, "rollout", run=1))
    again, _ = compiled(tmp_path, None, lm=kit.greedy_lm(asked))
    assert len(asked.prompts) == count and steady(again.result) == steady(second.result)


def test_a_sampling_lm_is_asked_anew_by_another_run(tmp_path: Path) -> None:
    asked = Asked(kit.stairs(1))
    for _ in range(2):
        compiled(tmp_path, None, lm=kit.greedy_lm(asked, temperature=0.7), resume=False)
    assert len(asked.prompts) == 2 * len(set(asked.prompts))


def test_another_lm_metric_or_setting_shares_nothing(tmp_path: Path) -> None:
    asked = Asked(kit.stairs(1))
    compiled(tmp_path, None, lm=kit.greedy_lm(asked), resume=False)
    count = len(asked.prompts)
    compiled(tmp_path, None, lm=kit.greedy_lm(asked, max_tokens=77), resume=False)
    assert len(asked.prompts) == 2 * count
    compiled(tmp_path, None, lm=kit.greedy_lm(asked), resume=False, failure_score=-1.0)
    assert len(asked.prompts) == 3 * count
    compiled(
        tmp_path,
        None,
        lm=kit.greedy_lm(asked),
        resume=False,
        metric=lambda gold, said: gold.label == said.label,
    )
    assert len(asked.prompts) == 4 * count


def test_a_damaged_journal_of_an_earlier_run_is_left_out_and_the_others_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Asked(kit.stairs(1))
    compiled(tmp_path, None, lm=kit.greedy_lm(asked), resume=False)
    count = len(asked.prompts)
    for name in ("worker-1", "worker-2"):
        path = tmp_path / "runs" / "0001" / "workers" / f"{name}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:3], b"x" + lines[3], *lines[4:]]))
        asked.prompts.clear()
        caplog.clear()
        _, program = compiled(tmp_path, None, lm=kit.greedy_lm(asked), resume=False)
        assert program is not None
        warned = [one.getMessage() for one in caplog.records if "of an earlier run" in one.getMessage()]
        assert len(warned) == 1 and "line 4 is damaged" in warned[0]
        if name == "worker-1":
            assert 0 < len(asked.prompts) < count
            shutil.rmtree(tmp_path / "runs" / "0002")  # which has all of them
    assert len(asked.prompts) == count, "both are left out, and that is said once"


def test_two_candidates_that_are_one_program_are_paid_for_once() -> None:
    """The order of demos is a choice, and without demos all orders are the same program."""
    asked = Asked(kit.stairs(1))
    compiled(None, None, lm=kit.greedy_lm(asked), budget=Budget(metric_calls=150), preset="paper")
    assert len(set(asked.prompts)) == len(asked.prompts)


def test_a_private_workers_rollouts_serve_nobody_else(tmp_path: Path) -> None:
    data = kit.examples(40)
    student, asked = dspy.Predict(kit.Sort), Asked(kit.stairs(1))

    def run(private: bool, names: tuple[str, str]) -> int:
        before = len(asked.prompts)
        workers = [
            Worker(names[0], data[:20], share_demos=not private),
            Worker(names[1], data[20:], share_demos=True),
        ]
        optimizer = kit.optimizer(workers=workers, instructions=kit.texts_for(student), run_dir=tmp_path)
        with dspy.context(lm=kit.greedy_lm(asked)):
            optimizer.compile(student)
        return len(asked.prompts) - before

    first = run(True, ("clinic", "open"))
    assert run(True, ("clinic", "open")) == 0
    assert run(False, ("other", "open")) > 0, "examples of the clinic are asked again under another name"
    assert first > 0
    server = (tmp_path / "runs" / "0001" / "server.jsonl").read_text()
    everything = "".join(path.read_text() for path in (tmp_path / "runs").rglob("*.json*"))
    assert "item 3" not in server and "item 3" not in everything, (
        "no example's text is in any journal of plain rollouts"
    )


def test_texts_of_a_private_workers_traces_stay_in_its_own_journal(tmp_path: Path) -> None:
    secret = [
        dspy.Example(message=f"item {number} planted-secret", label=kit.right_label(number)).with_inputs(
            "message"
        )
        for number in range(24)
    ]
    workers = [Worker("clinic", secret, share_demos=False), Worker("open", kit.examples(24, 100))]
    student = kit.TwoSteps()
    optimizer = kit.optimizer(
        workers=workers, bootstrap=True, instructions=kit.texts_for(student), run_dir=tmp_path
    )
    with dspy.context(lm=kit.make_lm(kit.stairs(2))):
        optimizer.compile(student)
    holders = {
        path.name for path in tmp_path.rglob("*") if path.is_file() and "planted-secret" in path.read_text()
    }
    assert holders == {"clinic.jsonl"}


def test_keys_tell_apart_what_matters_and_nothing_else() -> None:
    keys = RolloutKeys("scope")
    lm, example = kit.greedy_lm(kit.stairs(1)), kit.example(1)

    def key(program: Any, *, lm: Any = lm, example: Any = example, keys: RolloutKeys = keys) -> bytes:
        return keys.key(lm, program, example).digest

    def student(text: str = "Sort the message.", **config: Any) -> dspy.Predict:
        program = dspy.Predict(kit.Sort, **config)
        program.signature = program.signature.with_instructions(text)
        return program

    base = key(student())
    with_demo = student()
    with_demo.demos = [dspy.Example(message="m", label="red")]
    with_other_demo = student()
    with_other_demo.demos = [dspy.Example(message="m", label="blue")]
    other = [
        key(student("Sort it.")),
        key(with_demo),
        key(with_other_demo),
        key(student(temperature=1.0)),
        key(dspy.ChainOfThought(kit.Sort)),
        key(student(), example=kit.example(2)),
        key(student(), lm=kit.greedy_lm(kit.stairs(1), max_tokens=5)),
        key(student(), keys=RolloutKeys("another scope")),
    ]
    assert len({base, *other}) == 1 + len(other)
    assert base == key(
        student(), lm=kit.greedy_lm(kit.stairs(1)), example=kit.example(1), keys=RolloutKeys("scope")
    )


def test_an_lm_is_known_by_what_it_answers_and_not_by_its_key() -> None:
    def lm(**options: Any) -> dspy.LM:
        return dspy.LM(**{"model": "openai/m", "api_base": "http://host/v1", "api_key": "secret-1"} | options)

    same = [
        lm(),
        lm(api_key="secret-2"),
        lm(api_base="http://user:secret-3@host/v1?token=secret-4"),
        lm(timeout=3),
    ]
    other = [
        lm(model="openai/n"),
        lm(api_base="http://other/v1"),
        lm(temperature=0.5),
        lm(max_tokens=9),
        lm(seed=1),
        lm(model_type="responses"),
        lm(engine="litellm"),
    ]
    assert len({json.dumps(lm_identity(one), sort_keys=True) for one in same}) == 1
    assert len({json.dumps(lm_identity(one), sort_keys=True) for one in [same[0], *other]}) == 1 + len(other)
    assert "secret" not in json.dumps([lm_identity(one) for one in same])


def test_a_metered_lm_is_the_lm_that_it_wraps() -> None:
    lm, other = (dspy.LM(f"openai/{name}", api_key="k", temperature=0.0, max_tokens=5) for name in "mn")
    ledger = Ledger()
    wrapped = metered(lm, ledger=ledger, worker="eu")
    assert lm_identity(wrapped) == lm_identity(lm) and is_deterministic(wrapped)
    team = fallback([wrapped, metered(other, ledger=ledger, worker="eu")])
    assert lm_identity(team) == [lm_identity(lm), lm_identity(other)]
    asyncio.run(ledger.aclose())


def test_which_lms_repeat_themselves() -> None:
    hosted = dspy.LM("openai/m")
    assert not is_deterministic(hosted), "a provider's default temperature is not 0"
    assert is_deterministic(dspy.LM("openai/m", temperature=0.0))
    assert not is_deterministic(dspy.LM("openai/m", temperature=0.0), {"temperature": 0.3})
    assert not is_deterministic(dspy.LM("openai/m", temperature=0.3, seed=1)), (
        "a hosted seed is a best effort"
    )
    assert is_deterministic(kit.greedy_lm(kit.stairs(1)))
    assert is_deterministic(kit.greedy_lm(kit.stairs(1), temperature=0.5, seed=1))
    assert not is_deterministic(kit.greedy_lm(kit.stairs(1), temperature=0.5))
    assert not is_deterministic(kit.scripted_lm(kit.stairs(1), temperature=0.0)), (
        "nobody knows a foreign engine"
    )


def test_code_is_known_by_its_text_its_defaults_and_what_it_closes_over() -> None:
    def make(threshold: float) -> Any:
        def metric(gold: Any, prediction: Any) -> bool:
            return prediction.score > threshold

        return metric

    assert digest(code_identity(make(0.5))) == digest(code_identity(make(0.5)))
    assert digest(code_identity(make(0.5))) != digest(code_identity(make(0.6)))
    names: dict[str, Any] = {"__name__": "typed_at_a_prompt"}
    for number in (1, 2, 1):
        exec(f"def metric(gold, said): return gold in {{'a', 'b', {number}}}", names)
        names.setdefault("seen", []).append(digest(code_identity(names["metric"])))
    first, other, again = names["seen"]
    assert first == again != other
