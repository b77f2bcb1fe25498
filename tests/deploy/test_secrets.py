"""Planted secrets must be in none of the files, whatever they were planted in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import artifact_kit as kit
import dspy
import pytest

from asyndbt_dspy.deploy import load_artifact, read_artifact, save_artifact
from asyndbt_dspy.deploy.public_state import public_model_id
from asyndbt_dspy.errors import ArtifactError

KEY, HOST, FOLDER = "sk-planted-4711", "planted-host.internal", "/srv/planted-folder"
PLANTED = (KEY, HOST, FOLDER, "planted")


class PathEngine(kit.HashEngine):
    def dump_state(self) -> dict:
        return {"folder": f"{FOLDER}/weights", "api_key": KEY}

    @classmethod
    def load_state(cls, state: dict) -> PathEngine:
        return cls()


def lms() -> list[dspy.LM]:
    engine = PathEngine()
    return [
        dspy.LM("openai/gpt-4o-mini", api_key=KEY),
        dspy.LM("openai/gpt-4o-mini", api_key=KEY, api_base=f"https://{HOST}/v1"),
        dspy.LM("openai/gpt-4o-mini", extra_headers={"Authorization": f"Bearer {KEY}"}),
        dspy.LM("openai/gpt-4o-mini", model_list=[{"params": {"api_key": KEY, "api_base": HOST}}]),
        dspy.LM(f"local/{FOLDER}/weights", engine=engine, cache=False),
        dspy.LM(f"hosted_vllm/{FOLDER}/model.gguf", api_base=f"http://{HOST}", launch_kwargs={"env": KEY}),
    ]


def test_no_key_no_address_and_no_path_is_written(tmp_path: Path) -> None:
    for number, lm in enumerate(lms()):
        program = kit.tuned("two_steps")
        program.summarize.lm = lm
        program.secret = KEY
        program.decide.predict.config["extra_headers"] = {"X": KEY}
        program.decide.predict.train = [dspy.Example(message=f"{FOLDER}/train")]
        program.decide.predict.traces = [KEY]
        # Fields that no prompt shows: where an example came from, for instance.
        program.decide.predict.demos[0]["path"] = f"{FOLDER}/row.json"
        result = {
            "scores": {"best": 0.5, "why": KEY, f"{FOLDER}/run": 1.0},
            "metric_calls": 9,
            "run_dir": FOLDER,
        }
        trainset = [dspy.Example(message=KEY, path=FOLDER).with_inputs("message")]
        adapter = dspy.ChatAdapter()
        adapter.callbacks = [KEY]
        path = save_artifact(
            program, tmp_path / f"{number}", result=result, trainset=trainset, lm=lm, adapter=adapter
        )
        for file in path.iterdir():
            content = file.read_text()
            found = [text for text in (*PLANTED, str(tmp_path), str(Path.home()) + "/") if text in content]
            assert not found, f"{file.name} holds {found} of LM {number}"


@pytest.mark.parametrize("place", ["instructions", "demo"])
def test_a_secret_inside_the_prompt_is_refused_without_being_quoted(place: str, tmp_path: Path) -> None:
    program = kit.tuned("single")
    lm = dspy.LM("openai/gpt-4o-mini", api_key=KEY)
    if place == "demo":
        program.demos[0]["message"] = f"my key is {KEY}"
    else:
        program.signature = program.signature.with_instructions(f"Use {KEY}.")
    with pytest.raises(ArtifactError, match=r"setting 'api_key' of an LM.*secret") as refused:
        save_artifact(program, tmp_path / "a", lm=lm)
    assert KEY not in str(refused.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key": KEY},
        {"azure_ad_token": KEY},
        {"aws_access_key_id": KEY},
        {"api_base": f"https://user:{KEY}@{HOST}/v1"},
        {"gateway": f"https://user:{KEY}@{HOST}/v1"},
        {"extra_headers": {"X-Team": KEY}},
        {"organization": KEY},
        {"model_list": [{"litellm_params": {"model": "openai/x", "api_key": KEY}}]},
        {"extra_body": {"stop_keys": ["short", KEY]}},
        {"vertex_credentials": {"client_email": KEY}},
        {"vertex_project": KEY},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_secret_setting_of_an_lm_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    program = kit.tuned("single")
    value = next((text for text in settings.values() if isinstance(text, str)), KEY)
    program.signature = program.signature.with_instructions(f"Use {value}.")
    with pytest.raises(ArtifactError, match="secret"):
        save_artifact(program, tmp_path / "a", lm=dspy.LM("openai/gpt-4o-mini", **settings))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("openai/gpt-4o-mini", {"service_tier": "priority"}),
        ("vertex_ai/gemini-2.0-flash", {"custom_llm_provider": "vertex_ai"}),
        ("openai/gpt-4o-mini", {"metadata": {"purpose": "deciding on a priority"}}),
        ("openai/gpt-4o-mini", {"extra_body": {"guided_decoding_backend": "instructions"}}),
        ("openai/gpt-4o-mini", {"tokenizer": "priority"}),
        ("openai/gpt-4o-mini", {"response_format": {"properties": {"url": {"description": "priority"}}}}),
    ],
)
def test_names_of_tiers_providers_and_models_are_no_secrets(
    model: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    program = dspy.Predict(dspy.Signature("ticket -> level", "You are deciding on a priority."))
    program.lm = dspy.LM(model, **settings)
    manifest = read_artifact(save_artifact(program, tmp_path / "a")).manifest
    assert manifest["lms"]["predictors"]["self"]["left_out"] == list(settings)


def test_a_secret_of_the_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_API_KEY", KEY)
    program = kit.tuned("single")
    program.signature = program.signature.with_instructions(f"Use {KEY}.")
    with pytest.raises(ArtifactError, match=r"environment variable SOME_SERVICE_API_KEY.*secret") as refused:
        save_artifact(program, tmp_path / "a")
    assert KEY not in str(refused.value)


def saved_beside(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``program.json`` with a demo that holds a value of the environment."""
    monkeypatch.setenv("DB_PASSWORD", value)
    program = kit.tuned("single")
    program.demos[0]["message"] = f"I forgot my {value}"
    return (save_artifact(program, tmp_path / "a") / "program.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ["password", "Disabled", "PRODUCTION", "20240131"])
def test_words_and_numbers_of_the_environment_are_no_secrets(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"I forgot my {value}" in saved_beside(value, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "value", ["hunter2hunter2", "aBcDeFgHiJ", "correct horse battery", "4711471147114711"]
)
def test_what_is_no_word_is_a_secret_of_the_environment(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match="DB_PASSWORD"):
        saved_beside(value, tmp_path, monkeypatch)


def test_errors_of_loading_name_no_path(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refused:
        load_artifact(tmp_path / "nowhere", kit.single())
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "public"),
    [
        ("openai/gpt-4o-mini", "openai/gpt-4o-mini"),
        ("openrouter/meta-llama/llama-3", "openrouter/meta-llama/llama-3"),
        ("local//srv/weights/m.gguf", "local/m.gguf"),
        ("/srv/weights/m.gguf", "m.gguf"),
        ("local/~/weights/m", "local/m"),
        ("local/C:\\weights\\m.gguf", "local/m.gguf"),
        ("openai/http://host:80/v1/model", "openai/model"),
    ],
)
def test_model_ids_lose_paths_and_addresses(model: str, public: str) -> None:
    assert public_model_id(model) == public
