"""``docs/notation.md`` is complete and true."""

from __future__ import annotations

import dataclasses
import pathlib
import re

from asyndbt_dspy.core.config import AlgorithmConfig

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "notation.md").read_text(encoding="utf-8")


def named(line_start: str) -> set[str]:
    cells = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith(line_start)]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_improvement_of_the_configuration_is_in_the_table_of_switches() -> None:
    described = re.findall(
        r"^ {8}(\w+):(?:(?!^ {8}\w+).)*?\[O", AlgorithmConfig.__doc__ or "", flags=re.M | re.S
    )
    assert set(described) <= named("| `")
    fields = {field.name for field in dataclasses.fields(AlgorithmConfig)}
    rows = [line for line in TEXT[TEXT.index("## Switches") :].splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])} <= fields


def test_every_test_that_it_names_exists() -> None:
    for file, name in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?", TEXT):
        source = (ROOT / "tests" / "core" / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source, (file, name)


def test_every_file_that_it_names_exists() -> None:
    for file in set(re.findall(r"`([a-z_]+\.py)`", TEXT)):
        assert (ROOT / "asyndbt_dspy" / "core" / file).exists() or (
            ROOT / "tests" / "core" / file
        ).exists(), file
