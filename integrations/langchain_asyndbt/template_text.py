"""Instructions as the text of a template: its variables stay, and all other braces are literal."""

from __future__ import annotations

import re

from langchain_core.prompts import PromptTemplate
from langchain_core.prompts.string import get_template_variables

SEPARATOR = "\n\n"
"""Between the parts of a text: instructions, demos, variables."""

OPENINGS = {"mustache": r"\{\{", "jinja2": r"\{[{%#]"}
"""What begins something else than literal text; ends alone are literal."""

LITERAL = {
    "f-string": "{0}{0}",
    "mustache": "{{{{=<% %>=}}}}{0}<%={{{{ }}}}=%>",
    "jinja2": "{{{{ '{0}' }}}}",
}
"""How a brace or opening is written literally, as a format."""


def with_text(prompt: PromptTemplate, text: str) -> PromptTemplate:
    """``prompt`` with another template text and the same variables.

    Who writes instructions need not know templates: braces that hold none of the variables are literal, and
    variables that the text lacks are named after it, so that their values still reach the model.
    """
    lines = [f"{name}: {_written(prompt, name)}" for name in lacking_variables(prompt, text)]
    parts = [_literal_braces(prompt, text), *(["\n".join(lines)] if lines else [])]
    return prompt.model_copy(update={"template": SEPARATOR.join(parts)})


def lacking_variables(prompt: PromptTemplate, text: str) -> list[str]:
    """Variables of ``prompt`` that callers give and ``text`` has no place for."""
    found = _variables_in(_literal_braces(prompt, text), prompt.template_format) or set()
    return [name for name in prompt.input_variables if name not in found]


def escaped(text: str) -> str:
    """``text`` as the literal part of an f-string template."""
    return text.replace("{", "{{").replace("}", "}}")


def _literal_braces(prompt: PromptTemplate, text: str) -> str:
    """``text`` as a template in which braces mean the variables of ``prompt`` and nothing else."""
    known = {*prompt.input_variables, *prompt.partial_variables}
    found = _variables_in(text, prompt.template_format)
    if found is not None and found <= known:
        return text
    names = "|".join(re.escape(name) for name in sorted(known)) or "(?!)"
    if prompt.template_format == "f-string":
        # Pairs of doubled braces are literal already, also around a variable.
        kept = rf"\{{\{{\{{(?:{names})\}}\}}\}}|\{{\{{[^{{}}]*\}}\}}|\{{(?:{names})\}}"
        brace = "[{}]"
    else:
        kept, brace = rf"\{{\{{\s*(?:{names})\s*\}}\}}", OPENINGS[prompt.template_format]

    def written(match: re.Match[str]) -> str:
        return LITERAL[prompt.template_format].format(match[0]) if match["brace"] else match[0]

    return re.sub(f"{kept}|(?P<brace>{brace})", written, text)


def _variables_in(text: str, template_format: str) -> set[str] | None:
    """Variables of a template text, ``None`` where it is none."""
    try:
        return set(get_template_variables(text, template_format))
    except Exception:  # noqa: BLE001 - each template language has errors of its own
        return None


def _written(prompt: PromptTemplate, variable: str) -> str:
    return f"{{{variable}}}" if prompt.template_format == "f-string" else f"{{{{{variable}}}}}"
