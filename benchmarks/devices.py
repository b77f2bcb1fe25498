"""The local engine on every device of this machine: whether answers agree with the CPU's in float32, and how fast they come.

    python benchmarks/devices.py --data DIR [--out FILE]

SmolLM2, 120 sst2 sentences with four demos through DSPy's JSON adapter, 32 threads; then 60 new tokens of free text at
temperature 0, alone. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dspy
import torch
from quality_bench import cells, tasks

from asyndbt_dspy import local_lm

REQUESTS, DEMOS, THREADS, TOKENS = 120, 4, 32, 60


def measure(data: Path, device: str, dtype: str) -> dict[str, Any]:
    """Answers and rates of one device."""
    lm = local_lm("smollm2-135m", device=device, dtype=dtype)
    task = tasks.TASKS["sst2"]
    examples = tasks.load(data, task)
    program = task.build()
    for predictor in program.predictors():
        predictor.demos = examples.train[:DEMOS]
    parallel = dspy.Parallel(num_threads=THREADS, disable_progress_bar=True)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        parallel([(program, one.inputs()) for one in examples.train[-8:]])  # warm
        begun = time.perf_counter()
        answers = parallel([(program, one.inputs()) for one in examples.test[:REQUESTS]])
        seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    [text] = lm("Write three sentences about the sea.", max_tokens=TOKENS, temperature=0.0)
    alone = time.perf_counter() - begun
    return {
        "device": device,
        "dtype": dtype,
        "labels": [one.label for one in answers],
        "text": text,
        "requests_per_s": round(REQUESTS / seconds, 1),
        "ms_per_token_alone": round(1000 * alone / TOKENS, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("ASYNDBT_DATA"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data DIR or set ASYNDBT_DATA to the folder with sst2/")
    arms = [("cpu", "float32")]
    if torch.cuda.is_available():
        arms += [("cuda:0", "float32"), ("cuda:0", "bfloat16")]
    rows = [measure(Path(options.data), *arm) for arm in arms]
    for row in rows:
        labels = row.pop("labels")
        first = rows[0].setdefault("answers", labels)
        row["same_labels"] = sum(a == b for a, b in zip(labels, first, strict=True))
        row["same_text"] = row["text"] == rows[0]["text"]
    rows[0].pop("answers")
    line = {"benchmark": "devices", "device": cells.device(), "cores": os.cpu_count(), "arms": rows}
    print(json.dumps(line))
    if options.out:
        options.out.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
