"""A saved program is the program: same answers, elsewhere too; whatever differs is refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import artifact_kit as kit
import dspy
import pytest

from asyndbt_dspy.deploy import evaluate_artifact, load_artifact, read_artifact, save_artifact
from asyndbt_dspy.deploy.manifest import pretty_json, seal
from asyndbt_dspy.errors import ArtifactError, ConfigurationError

FRESH = """
import json, sys
import dspy
from asyndbt_dspy.deploy import evaluate_artifact, load_artifact
import artifact_kit as kit
kind, path = sys.argv[1:]
program = load_artifact(path, kit.KINDS[kind]())
with dspy.context(lm=kit.hash_lm()):
    print(json.dumps([program(**e.inputs().toDict()).toDict() for e in kit.examples(kind)]))
"""


def answers(program: dspy.Module, kind: str) -> list[dict]:
    with dspy.context(lm=kit.hash_lm()):
        return [program(**example.inputs().toDict()).toDict() for example in kit.examples(kind)]


@pytest.mark.parametrize("kind", kit.KINDS)
def test_a_saved_program_answers_as_the_one_in_memory_in_a_new_process(kind: str, tmp_path: Path) -> None:
    program = kit.tuned(kind)
    expected = answers(program, kind)
    assert expected != answers(kit.KINDS[kind](), kind), "the hash LM must tell prompts apart"
    path = save_artifact(program, tmp_path / "a")
    here = Path(__file__).parent
    root = here.parents[1]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, kind, str(path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{here}", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(json.dumps(expected))


@pytest.mark.parametrize("kind", kit.KINDS)
def test_dspy_itself_reads_the_state(kind: str, tmp_path: Path) -> None:
    program = kit.tuned(kind)
    path = save_artifact(program, tmp_path / "a")
    plain = kit.KINDS[kind]()
    plain.load(path / "program.json")
    assert answers(plain, kind) == answers(program, kind)


def test_the_student_and_the_program_stay_as_they_are(tmp_path: Path) -> None:
    program, student = kit.tuned("two_steps"), kit.TwoSteps()
    before, before_student = program.dump_state(), student.dump_state()
    load_artifact(save_artifact(program, tmp_path / "a"), student)
    assert program.dump_state() == before
    assert student.dump_state() == before_student


@pytest.mark.parametrize(
    "made", ["message, tags: list[str] -> label: Literal['low', 'high']", "q: int -> a: bool"]
)
@pytest.mark.parametrize("cls", [dspy.Predict, dspy.ChainOfThought])
def test_plain_programs_are_rebuilt_without_a_student(made: str, cls: type, tmp_path: Path) -> None:
    program = cls(made)
    predictor = program.predictors()[0]
    predictor.signature = predictor.signature.with_instructions("Do it.")
    loaded = load_artifact(save_artifact(program, tmp_path / "a"))
    assert type(loaded) is cls
    assert loaded.dump_state() == program.dump_state()


def test_demos_keep_the_order_of_the_keys_in_their_dictionaries(tmp_path: Path) -> None:
    program = dspy.Predict("order: dict[str, int] -> parts: dict[str, int]")
    program.demos = [dspy.Example(order={"lamp": 2, "bulb": 1}, parts={"wire": 3, "foot": 2})]
    loaded = load_artifact(save_artifact(program, tmp_path / "a"), program)
    (demo,) = loaded.demos
    assert (list(demo.order), list(demo.parts)) == (["lamp", "bulb"], ["wire", "foot"])


def test_demos_keep_fields_that_have_the_name_of_an_argument(tmp_path: Path) -> None:
    program = dspy.Predict("base, self_ -> result")
    program.demos = [dspy.Example({"base": "rice", "self_": "x", "result": "risotto"})]
    (demo,) = load_artifact(save_artifact(program, tmp_path / "a"), program).demos
    assert dict(demo.items()) == {"base": "rice", "self_": "x", "result": "risotto"}


@pytest.mark.parametrize("cls", [dspy.Predict, dspy.ChainOfThought])
def test_a_predictors_own_settings_are_rebuilt_or_asked_for(cls: type, tmp_path: Path) -> None:
    path = save_artifact(cls("q -> a", temperature=0.7, max_tokens=5), tmp_path / "a")
    assert load_artifact(path).predictors()[0].config == {"temperature": 0.7, "max_tokens": 5}
    own = cls("q -> a", temperature=0.2)
    assert load_artifact(path, own).predictors()[0].config == {"temperature": 0.2}
    path = save_artifact(cls("q -> a", extra_headers={"x-team": "acme-internal"}), tmp_path / "b")
    assert "acme-internal" not in "".join(file.read_text() for file in path.iterdir())
    with pytest.raises(ArtifactError, match=r"extra_headers.*student"):
        load_artifact(path)
    assert load_artifact(path, own).predictors()[0].config == {"temperature": 0.2}


@pytest.mark.parametrize(
    "config", [[], {"self": []}, {"self": {"sampling": {"api_base": "http://elsewhere"}}}]
)
def test_settings_that_are_never_written_are_not_rebuilt(config: object, tmp_path: Path) -> None:
    path = save_artifact(dspy.Predict("q -> a"), tmp_path / "a")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    (path / "manifest.json").write_bytes(pretty_json(seal({**manifest, "config": config})))
    with pytest.raises(ArtifactError, match="config"):
        load_artifact(path)


def test_other_programs_are_not_rebuilt_without_a_student(tmp_path: Path) -> None:
    path = save_artifact(kit.tuned("two_steps"), tmp_path / "a")
    with pytest.raises(ArtifactError, match="student"):
        load_artifact(path)


def test_another_adapter_than_the_saved_one_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program, data = kit.tuned("single"), kit.examples("single", 2)
    with dspy.context(adapter=dspy.JSONAdapter()):
        path = save_artifact(program, tmp_path / "a")
        load_artifact(path)
        assert not caplog.records
    evaluate_artifact(path, data, lambda *_: 1.0, lm=kit.hash_lm(), adapter=dspy.JSONAdapter())
    assert not caplog.records
    for load in (load_artifact, lambda path: evaluate_artifact(path, data, lambda *_: 1.0, lm=kit.hash_lm())):
        load(path)
        (record,) = caplog.records
        assert "JSONAdapter, and dspy.settings has ChatAdapter" in record.getMessage()
        caplog.clear()


class Reordered(dspy.Signature):
    tags: list[str] = dspy.InputField()
    message: str = dspy.InputField()
    label: Literal["low", "high", "none"] = dspy.OutputField()


class Retyped(dspy.Signature):
    message: str = dspy.InputField()
    tags: list[str] = dspy.InputField()
    label: Literal["low", "high"] = dspy.OutputField()


@pytest.mark.parametrize(("other", "said"), [(Reordered, "inputs of 'self'"), (Retyped, "outputs of 'self'")])
def test_another_signature_is_refused_with_what_differs(other: type, said: str, tmp_path: Path) -> None:
    path = save_artifact(kit.tuned("single"), tmp_path / "a")
    with pytest.raises(ArtifactError, match=said) as refused:
        load_artifact(path, dspy.Predict(other))
    assert refused.value.differences


def test_an_lm_for_a_predictor_that_there_is_not_is_refused(tmp_path: Path) -> None:
    path = save_artifact(kit.tuned("two_steps"), tmp_path / "a")
    lm = kit.hash_lm()
    with pytest.raises(ConfigurationError, match=r"\['sumarize'\].*\['decide.predict', 'summarize'\]"):
        load_artifact(path, kit.TwoSteps(), lms={"sumarize": lm})
    assert load_artifact(path, kit.TwoSteps(), lms={"summarize": lm}).summarize.lm is lm


def test_other_predictors_are_refused(tmp_path: Path) -> None:
    path = save_artifact(kit.tuned("two_steps"), tmp_path / "a")
    with pytest.raises(ArtifactError, match="summarize"):
        load_artifact(path, kit.single())


@pytest.mark.parametrize("name", ["program.json", "prompt.md", "messages.json", "manifest.json"])
def test_every_changed_byte_is_refused(name: str, tmp_path: Path) -> None:
    path = save_artifact(kit.tuned("single"), tmp_path / "a")
    original = (path / name).read_bytes()
    for position in range(0, len(original), max(1, len(original) // 200)):
        changed = bytearray(original)
        changed[position] ^= 1
        (path / name).write_bytes(bytes(changed))
        with pytest.raises(ArtifactError, match=name):
            read_artifact(path)
    for changed_length in (original + b"\n", original[:-1]):
        (path / name).write_bytes(changed_length)
        with pytest.raises(ArtifactError, match=name):
            read_artifact(path)
    (path / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        read_artifact(path)


def reseal(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(changes)
    manifest.pop("sha256")
    (path / "manifest.json").write_bytes(pretty_json(seal(manifest)))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save_artifact(kit.tuned("single"), tmp_path / "a")
    reseal(path, format_version=2)
    with pytest.raises(ArtifactError, match=r"format_version is 2.*newer"):
        read_artifact(path)


def test_the_manifest_names_what_the_issue_of_an_audit_asks(tmp_path: Path) -> None:
    program = kit.tuned("two_steps")
    program.summarize.lm = dspy.LM("openai/gpt-4o-mini", temperature=0.2, max_tokens=50)
    result = {
        "student_score": 0.5,
        "score": 0.7,
        "interval": [0.6, 0.8],
        "metric_calls": 300,
        "run_dir": "/srv/x",
    }
    data = kit.examples("two_steps")
    first = save_artifact(program, tmp_path / "a", result=result, trainset=data, lm=kit.hash_lm())
    second = save_artifact(program, tmp_path / "b", parent=first, adapter=dspy.JSONAdapter())
    manifest = read_artifact(first).manifest
    assert manifest["scores"] == {"student_score": 0.5, "score": 0.7, "interval": [0.6, 0.8]}
    assert manifest["budget"] == {"metric_calls": 300}
    assert manifest["data"]["trainset"]["examples"] == len(data)
    assert manifest["lms"]["default"]["model"] == "test/hash"
    assert manifest["lms"]["predictors"]["summarize"]["sampling"] == {"temperature": 0.2, "max_tokens": 50}
    assert manifest["versions"]["dspy"] == dspy.__version__
    assert read_artifact(second).manifest["parent"] == read_artifact(first).id
    assert read_artifact(second).manifest["adapter"]["class"] == "JSONAdapter"


def test_equal_programs_make_equal_bytes(tmp_path: Path) -> None:
    one, two = (save_artifact(kit.tuned("react"), tmp_path / name) for name in "ab")
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_an_artifact_is_never_overwritten_and_nothing_is_left_behind(tmp_path: Path) -> None:
    save_artifact(kit.tuned("single"), tmp_path / "a")
    with pytest.raises(ArtifactError, match="not empty"):
        save_artifact(kit.tuned("react"), tmp_path / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_artifact(kit.tuned("single"), tmp_path / "file" / "folder" / "a")


def test_own_lms_come_back_or_must_be_given(tmp_path: Path) -> None:
    program = kit.tuned("two_steps")
    program.summarize.lm = dspy.LM("openai/gpt-4o-mini", temperature=0.2, api_key="sk-planted-planted")
    program.decide.predict.lm = own = kit.hash_lm()
    path = save_artifact(program, tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"'decide.predict'.*'test/hash'"):
        load_artifact(path, kit.TwoSteps())
    loaded = load_artifact(path, kit.TwoSteps(), lms={"decide.predict": own})
    assert loaded.decide.predict.lm is own
    assert loaded.summarize.lm.model == "openai/gpt-4o-mini"
    assert loaded.summarize.lm.kwargs["temperature"] == 0.2
    student = kit.TwoSteps()
    student.decide.predict.lm = own
    assert load_artifact(path, student).decide.predict.lm is own


def test_an_lm_at_an_address_is_not_rebuilt_at_another_one(tmp_path: Path) -> None:
    program = kit.tuned("single")
    program.lm = dspy.LM("openai/internal", api_base="http://10.0.0.5:8000/v1", api_key="sk-planted-planted")
    path = save_artifact(program, tmp_path / "a")
    with pytest.raises(ArtifactError, match="api_base"):
        load_artifact(path, kit.single())


def test_a_demo_that_json_would_change_is_refused(tmp_path: Path) -> None:
    program = dspy.Predict("items -> answer")
    # A list is shown to the LM as a numbered list, a tuple as JSON: reading it back would change the prompt.
    program.demos = [dspy.Example(items=("a", "b"), answer="x")]
    with pytest.raises(ArtifactError, match="demo"):
        save_artifact(program, tmp_path / "a")


def test_the_optimizers_result_is_summed_up(tmp_path: Path) -> None:
    candidate = {"arms": [0], "program": {"self": {"instructions": "secret text"}}, "eliminated": False}
    numbers = {"low": 0.4, "high": 0.6, "examples": 40, "advantage": None, "advantage_error": None}
    result = {
        "winner": "candidate 1",
        "candidates": [
            {**candidate, **numbers, "name": "student", "score": 0.5, "won": False},
            {**candidate, **numbers, "name": "candidate 1", "score": 0.55, "won": True},
        ],
        "workers": [{"lm_calls": 10, "prompt_tokens": 5}, {"lm_calls": 20, "prompt_tokens": None}],
        "metric_calls": 300,
        "seconds": 1.5,
        "settings": {"budget": {"metric_calls": 300}, "run_dir": "/srv/x"},
    }
    manifest = read_artifact(save_artifact(kit.tuned("single"), tmp_path / "a", result=result)).manifest
    assert manifest["scores"]["student"] == {"score": 0.5, "low": 0.4, "high": 0.6, "examples": 40}
    assert manifest["scores"]["optimized"]["score"] == 0.55
    assert manifest["budget"]["lm_calls"] == 30
    assert manifest["budget"]["allowed"] == {"metric_calls": 300}
    assert "secret" not in json.dumps(manifest)
