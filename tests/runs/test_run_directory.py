"""Whose ``run_dir`` it is, which run goes on, and what must be the same for that."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from asyndbt_dspy.errors import ConfigurationError, JournalError, ResumeError
from asyndbt_dspy.runs.run_directory import RunDirectory, safe_name


def manifest(**changes: Any) -> dict[str, Any]:
    fingerprints = {
        "program": "p1",
        "teacher": None,
        "metric": "m",
        "data": {"eu": "3 examples, a", "us": "3 examples, b"},
        "lms": {"eu": "l1", "us": "l2"},
        "settings": {"seed": 0, "config": {"draws": 2}},
    }
    budget = {"metric_calls": 300, "dollars": None}
    found = {"package": "0.1.0", "fingerprints": fingerprints, "budget": budget}
    return json.loads(json.dumps(found)) | changes


def opened(path: Path, *, resume: bool = True, **changes: Any) -> RunDirectory:
    return RunDirectory(path, resume=resume, manifest=manifest(**changes))


def test_a_fresh_start_takes_the_next_number_and_resume_the_newest(tmp_path: Path) -> None:
    for resume, number, is_resumed in ((True, 1, False), (True, 1, True), (False, 2, False), (True, 2, True)):
        directory = opened(tmp_path / "d", resume=resume)
        assert (directory.number, directory.is_resumed) == (number, is_resumed)
        directory.close()


def test_two_at_a_time_are_refused_and_the_holder_is_named(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(JournalError, match=rf"in use by process {os.getpid()} on "):
        opened(tmp_path)
    first.close()
    opened(tmp_path).close()


def test_a_process_that_died_leaves_no_lock(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        opened(tmp_path)
        os._exit(0)  # without closing anything
    os.waitpid(pid, 0)
    opened(tmp_path).close()


def test_a_start_that_was_cut_short_leaves_no_run(tmp_path: Path) -> None:
    (tmp_path / "runs" / "new" / "workers").mkdir(parents=True)
    directory = opened(tmp_path)
    assert directory.numbers() == [1] and not directory.is_resumed
    directory.close()


def test_every_difference_is_listed(tmp_path: Path) -> None:
    opened(tmp_path).close()
    changed = manifest()
    changed["fingerprints"] |= {
        "program": "p2",
        "metric": "m2",
        "data": {"eu": "3 examples, x", "asia": "1 examples, y"},
        "lms": {"eu": "l9", "us": "l2"},
        "settings": {"seed": 1, "config": {"draws": 4}},
    }
    with pytest.raises(ResumeError) as caught:
        opened(tmp_path, package="0.2.0", fingerprints=changed["fingerprints"])
    assert caught.value.differences == (
        "it was written by asyndbt-dspy 0.1.0, and this is 0.2.0",
        "worker 'asia' was added",
        "the data of worker 'eu' changed",
        "worker 'us' was removed",
        "the LM of worker 'eu' changed (model, endpoint or sampling)",
        "the metric (its name or its code) changed",
        "the program (structure, signatures, instructions or demos) changed",
        "settings.config.draws was 2 and is 4",
        "settings.seed was 0 and is 1",
    )
    assert all(one in str(caught.value) for one in caught.value.differences)
    opened(tmp_path).close()  # the refusal let the folder go


def test_workers_in_another_order_are_a_difference_of_their_own(tmp_path: Path) -> None:
    def fingerprints(*names: str) -> dict[str, Any]:
        return {"workers": list(names), "data": dict.fromkeys(names, "d"), "lms": dict.fromkeys(names, "l")}

    opened(tmp_path, fingerprints=fingerprints("eu", "us")).close()
    for given, difference in (
        (("us", "eu"), "the order of the workers was ['eu', 'us'] and is ['us', 'eu']"),
        (("eu",), "worker 'us' was removed"),
    ):
        with pytest.raises(ResumeError) as caught:
            opened(tmp_path, fingerprints=fingerprints(*given))
        assert set(caught.value.differences) == {difference}


def test_a_budget_may_be_raised_and_never_lowered(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(ResumeError, match=r"Budget\(metric_calls=299\) is below the 300 of before"):
        opened(tmp_path, budget={"metric_calls": 299, "dollars": None})
    with pytest.raises(ResumeError, match=r"Budget\(dollars=5\) is below the unlimited of before"):
        opened(tmp_path, budget={"metric_calls": 300, "dollars": 5.0})
    higher = opened(tmp_path, budget={"metric_calls": 400, "dollars": None})
    assert higher.raised == ("metric_calls",)
    higher.close()
    opened(tmp_path).close()  # nothing was done with it
    higher = opened(tmp_path, budget={"metric_calls": 400, "dollars": None})
    higher.keep_budget()
    higher.close()
    with pytest.raises(ResumeError, match="below the 400"):
        opened(tmp_path)
    lifted = opened(tmp_path, budget={"metric_calls": None, "dollars": None})
    assert lifted.raised == ("metric_calls",)
    lifted.close()


def test_bad_places_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match="is a file; give a folder"):
        opened(file)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        opened(file / "below")


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, whom tests may run as, can write everywhere
    with pytest.raises(ConfigurationError, match="cannot be written"):
        opened(tmp_path / "d")


def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    opened(tmp_path).close()
    path = tmp_path / "runs" / "0001" / "manifest.json"
    path.write_text("{")
    with pytest.raises(JournalError, match=r"cannot read .*manifest\.json"):
        opened(tmp_path)
    bare = {"format": 1, "package": "0.1.0"}
    for content, said in (
        (manifest(format=99), "has format 99"),
        (manifest(format="x"), "has format 'x'"),
        (manifest(format=None), "has format None"),
        ([1], "it is no JSON object"),
        (bare, "it has no 'fingerprints'"),
        (bare | {"fingerprints": {}}, "it has no 'budget'"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(JournalError, match=said):
            opened(tmp_path)


def test_who_cannot_sign_the_folder_lets_it_go(tmp_path: Path) -> None:
    (tmp_path / "holder.json").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="cannot be written"):
            opened(tmp_path)
    (tmp_path / "holder.json").rmdir()
    opened(tmp_path).close()


def test_a_raised_budget_that_cannot_be_written_down_is_a_journal_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path).close()
    higher = opened(tmp_path, budget={"metric_calls": 400, "dollars": None})

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(JournalError, match=r"manifest .*No space left on device.*resume=True"):
        higher.keep_budget()
    higher.close()


def test_worker_names_become_file_names_that_differ() -> None:
    names = ["eu", "EU", "../etc", "a/b", "a:b", "", "ß", "x" * 300, "CON", "con", "nul.", "eu."]
    files = [safe_name(name) for name in names]
    assert files[0] == "eu"
    assert len({file.lower() for file in files}) == len(names)
    assert all(file.split(".")[0] not in ("con", "nul") for file in files), "devices on Windows"
    assert all(0 < len(file) < 80 and "/" not in file and not file.startswith(".") for file in files)
