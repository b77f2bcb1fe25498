"""Rows as a results file holds them."""

from __future__ import annotations

from typing import Any


def made_row(optimizer: str, bits: str, **changes: Any) -> dict[str, Any]:
    """A row of a results file."""
    row = {
        "task": "sst2",
        "lm": "small",
        "optimizer": optimizer,
        "budget": 0 if optimizer in ("student", "labeled_few_shot") else 300,
        "seed": 0,
        "test": 100 * bits.count("1") / len(bits),
        "valid": 50.0,
        "task_lm_calls": 300,
        "proposer_calls": 0,
        "metric_calls": 300,
        "seconds": 1.0,
        "test_bits": bits,
        "program": optimizer,
        "state": {},
        "settings": {},
        "incumbents": [],
        "precision": "auto",
        "versions": {},
    }
    return {**row, **changes}
