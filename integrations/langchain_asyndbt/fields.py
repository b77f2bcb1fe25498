"""Names that a template variable can have as a field of a DSPy signature."""

from __future__ import annotations

import keyword
import re

import dspy

OUTPUT = "output"
"""The field that holds what a chain gives."""

# Keyword arguments of `dspy.Predict` and `dspy.Example` that are not fields, and the name of our output.
TAKEN = frozenset(
    {"signature", "new_signature", "demos", "config", "lm", "prediction", "self", "args", "base", OUTPUT}
)


def field_name(variable: str) -> str:
    """The field for a template variable: the name itself wherever it can be one."""
    # Examples do not show fields whose names begin with `dspy_`.
    is_hidden = variable.startswith(("_", "dspy_"))
    is_output = variable.startswith(f"{OUTPUT}_")
    is_plain = variable.isidentifier() and not keyword.iskeyword(variable) and not is_hidden
    if is_plain and not is_output and variable not in TAKEN and not hasattr(dspy.Signature, variable):
        return variable
    return "var_" + re.sub(r"\W", "_", variable)


def output_field(key: str | None) -> str:
    """The field that holds what a chain gives, or, of the dictionary that it gives, the value of ``key``."""
    return OUTPUT if key is None else f"{OUTPUT}_" + re.sub(r"\W", "_", key)
