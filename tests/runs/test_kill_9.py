"""``benchmarks/crash.py`` in a small form: real processes, a real socket, ``kill -9`` at random moments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_few_killed_compiles_end_as_undisturbed_ones_and_pay_for_nothing_twice(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [sys.executable, "benchmarks/crash.py", "--kills", "6", "--calls", "60"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["kills"], line["identical"], line["paid_twice"]) == (6, 6, 0)
    assert line["recorded_rollouts_found_on_resume"] > 0, "the processes died in the middle of their work"
