"""The example with two hosted providers and a local model, its providers on loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asyndbt_dspy.testing.provider import Provider

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "two_providers.py"
WORDS = {
    "charge": "billing",
    "parcel": "delivery",
    "return": "returns",
    "password": "login",
    "app": "malfunction",
}


def answer(messages: list[dict[str, Any]]) -> str:
    """By the first word that it knows."""
    text = str(messages[-1]["content"]).split("Respond with", 1)[0].lower()
    topic = next((topic for word, topic in WORDS.items() if word in text), "question")
    return json.dumps({"topic": topic})


@pytest.mark.parametrize("engine", ["auto", "litellm"])
def test_three_workers_of_three_kinds_make_one_program(engine: str, tmp_path: Path) -> None:
    program = tmp_path / "program.json"
    with Provider(answer) as first, Provider(answer) as second:
        command = [
            *(sys.executable, EXAMPLE, "--engine", engine, "--calls", "60", "--out", program),
            *("--first", "openai/first-model", "--first-base", first.url),
            *("--second", "openai/second-model", "--second-base", second.url),
        ]
        environment = {**os.environ, "OPENAI_API_KEY": "no-key", "DSPY_CACHEDIR": str(tmp_path / "cache")}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        seen = {"first": first.seen(), "second": second.seen()}
    assert "expected: " in done.stderr
    assert "dollars" in done.stderr or "$" in done.stderr
    assert set(json.loads(program.read_text())) > {"signature"}
    for name, calls in seen.items():
        # A line of the spending table: worker, attempts, answers, tokens, …
        (line,) = re.findall(rf"^{name} +(\d+) +(\d+) .*$", done.stdout.split("attempts", 1)[1], re.MULTILINE)
        assert int(line[0]) == len(calls) > 0
    (local,) = re.findall(r"^local +(\d+) ", done.stdout.split("attempts", 1)[1], re.MULTILINE)
    assert int(local) > 0
