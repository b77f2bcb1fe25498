from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from quality_bench import measure, tasks


def write_data(folder: Path, names: Sequence[str]) -> Path:
    """A data folder with numbered examples whose labels follow their numbers."""
    for name in names:
        task = tasks.TASKS[name]
        made = measure.made_examples(task, 48, 12, 10)
        parts = {"train": made.train[:24], "pool": made.train[24:], "valid": made.valid, "test": made.test}
        (folder / task.folder).mkdir(parents=True, exist_ok=True)
        for part, examples in parts.items():
            lines = [json.dumps({"id": number, **dict(one.items())}) for number, one in enumerate(examples)]
            (folder / task.folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", ["sst2", "trec", "ag_news_two_step"])
