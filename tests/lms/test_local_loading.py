"""Which LMs share weights: copies, loaded and unpickled programs; a tiny model in a folder stands for real weights."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator
from pathlib import Path

import dspy
import pytest
from local_tiny import byte_tokenizer, tiny_model

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.local import local_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def lm(folder: Path) -> Iterator[dspy.LM]:
    made = local_lm(str(folder), deterministic=True, max_tokens=4)
    yield made
    made.engine.close()


def test_a_pickled_lm_shares_the_weights_of_the_living(lm: dspy.LM) -> None:
    read = pickle.loads(pickle.dumps(lm))
    assert read.engine.core is lm.engine.core
    assert read._async_engine_spec.core is lm.engine.core
    assert read.kwargs == lm.kwargs


def test_a_program_with_a_local_lm_is_saved_whole_and_read_after_its_lm_is_gone(
    folder: Path, tmp_path: Path
) -> None:
    made = local_lm(str(folder), deterministic=True, max_tokens=4)
    said = made("hello")
    program = dspy.Predict("question -> answer")
    program.lm = made
    program.save(tmp_path / "program", save_program=True)
    made.engine.close()
    del made, program
    gc.collect()
    read = dspy.load(tmp_path / "program", allow_pickle=True).lm
    assert read("hello") == said
    read.engine.close()


def test_a_loaded_program_shares_the_weights_of_the_lm_that_was_saved(lm: dspy.LM, tmp_path: Path) -> None:
    program = dspy.Predict("question -> answer")
    program.lm = lm
    program.save(tmp_path / "program.json")
    loaded = dspy.Predict("question -> answer")
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert loaded.lm.engine.core is lm.engine.core


def test_a_path_is_as_good_as_its_text(folder: Path) -> None:
    lm = local_lm(folder, max_tokens=4)
    assert lm.model == f"local/{folder}"
    assert lm.engine.dump_state()["model"] == str(folder)
    lm.engine.close()


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40])
def test_a_damaged_gguf_file_is_called_damaged(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNDBT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"broken\.gguf.*damaged"):
        local_lm(tmp_path / "broken.gguf")
    assert not list((tmp_path / "cache" / "weights").iterdir())


def test_two_calls_are_two_engines_and_a_closed_one_is_shared_no_more(folder: Path) -> None:
    first, second = (local_lm(str(folder), max_batch_tokens=77, max_tokens=4) for _ in range(2))
    assert second.engine.core is not first.engine.core
    first.engine.close()
    assert pickle.loads(pickle.dumps(first)).engine.core is second.engine.core
    second.engine.close()
    third = pickle.loads(pickle.dumps(first))
    assert third.engine.core not in (first.engine.core, second.engine.core)
    assert len(third("hello")) == 1
    third.engine.close()


def test_what_an_earlier_version_saved_shares_weights_too(lm: dspy.LM) -> None:
    state = lm.engine.dump_state()
    del state["max_running_tokens"]
    assert type(lm.engine).load_state(state).core is lm.engine.core
