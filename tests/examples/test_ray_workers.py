"""The example with a Ray cluster, the real SmolLM2 in every actor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra: pip install 'asyndbt-dspy[ray]'")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ray_workers.py"


def test_three_actors_with_a_model_each_make_one_program(tmp_path: Path) -> None:
    program = tmp_path / "program.json"
    command = [sys.executable, EXAMPLE, "--calls", "60", "--num-cpus", "0.1", "--out", program]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "w2" in done.stdout
    assert "set aside" not in done.stdout
    assert "signature" in json.loads(program.read_text())
