"""`import asyndbt_dspy`: which names it gives, and how little it does."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asyndbt_dspy

ROOT = Path(__file__).parents[1]
SOURCE = ast.parse((ROOT / "asyndbt_dspy" / "__init__.py").read_text(encoding="utf-8"))
OPTIONAL = ("torch", "transformers", "ray", "langchain_core", "mlflow", "flwr", "matplotlib")
FRONT = ("AsynDBT", "Worker", "Budget", "Result", "LocalEngine", "SimulatedEngine")

# Runs first in a fresh interpreter: every attempt to look up a host or to connect is written down and refused.
WATCH_NETWORK = """
import os, socket, sys
attempts = []
def refuse(*arguments, **options):
    attempts.append(repr(arguments[-1]))
    raise OSError("no connection may be opened")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = refuse
"""


def in_fresh_interpreter(code: str, **environment: str) -> str:
    """Run `code` in a new interpreter with the network watched; returns what it printed."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("LITELLM", "COVERAGE"))
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCH_NETWORK + code],
        env={**variables, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after(code: str, names: tuple[str, ...]) -> str:
    """Which of the modules `names` the code loads, and the connections it tried to open."""
    return in_fresh_interpreter(f"{code}\nprint([n for n in {names!r} if n in sys.modules], attempts)")


def test_the_import_loads_nothing_large_and_opens_no_connection() -> None:
    large = (*OPTIONAL, "dspy", "litellm", "numpy", "tqdm")
    assert loaded_after("import asyndbt_dspy", large) == "[] []"


def test_the_command_line_starts_where_there_is_no_unix() -> None:
    code = """
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
from asyndbt_dspy.cli import main
main(["simulate", "--workers", "2", "--metric-calls", "20", "--seeds", "1"])
"""
    assert "2 workers" in in_fresh_interpreter(code)


def test_the_front_names_load_no_optional_library_and_open_no_connection() -> None:
    code = f"import asyndbt_dspy\nfor name in {FRONT!r}: getattr(asyndbt_dspy, name)"
    assert loaded_after(code, OPTIONAL) == "[] []"
    assert loaded_after(code, ("dspy", "numpy")) == "['dspy', 'numpy'] []", (
        "otherwise the check above proves nothing"
    )


def test_litellm_imported_afterwards_opens_no_connection() -> None:
    assert loaded_after("import asyndbt_dspy, litellm", ("litellm",)) == "['litellm'] []"


def test_the_watch_sees_what_litellm_does_without_us() -> None:
    printed = loaded_after("import litellm", ("litellm",))
    assert printed.startswith("['litellm'] [") and not printed.endswith("[]"), (
        "the test above would pass without us"
    )


@pytest.mark.parametrize(("before", "after"), [(None, "True"), ("False", "False")])
def test_the_price_table_stays_offline_unless_the_user_says_otherwise(before: str | None, after: str) -> None:
    environment = {} if before is None else {"LITELLM_LOCAL_MODEL_COST_MAP": before}
    code = "import asyndbt_dspy; print(os.environ['LITELLM_LOCAL_MODEL_COST_MAP'])"
    assert in_fresh_interpreter(code, **environment) == after


@pytest.mark.parametrize("name", asyndbt_dspy.__all__)
def test_every_public_name_is_the_one_its_module_defines(name: str) -> None:
    value = getattr(asyndbt_dspy, name)
    assert value.__name__ == name
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert name in dir(asyndbt_dspy)


def test_type_checkers_see_the_names_that_users_get() -> None:
    block = next(
        node for node in SOURCE.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    )
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == asyndbt_dspy._HOMES
    assert sorted(seen) == sorted(asyndbt_dspy.__all__)


def test_every_error_of_the_hierarchy_is_public() -> None:
    errors = importlib.import_module("asyndbt_dspy.errors")
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == {name for name in asyndbt_dspy.__all__ if name.endswith("Error")}
    assert all(issubclass(getattr(errors, name), asyndbt_dspy.AsynDBTError) for name in defined)


def test_an_unknown_name_is_an_error_that_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'AsyncDBT'; public names: .*AsynDBT"):
        _ = asyndbt_dspy.AsyncDBT


def test_a_missing_extra_is_named_with_the_command_that_installs_it() -> None:
    code = """
sys.modules["torch"] = None
import asyndbt_dspy
try:
    asyndbt_dspy.local_lm
except ModuleNotFoundError as error:
    print(error)
"""
    assert in_fresh_interpreter(code) == "local_lm needs torch: pip install 'asyndbt-dspy[local]'"


def test_missing_extras_fail_neither_a_star_import_nor_introspection() -> None:
    code = """
sys.modules.update({name: None for name in ("ray", "torch")})
import inspect, pydoc
import asyndbt_dspy
from asyndbt_dspy import *
names = {name for name, _ in inspect.getmembers(asyndbt_dspy)}
pydoc.render_doc(asyndbt_dspy)
print(AsynDBT.__name__, "AsynDBT" in names, names & {"RayEngine", "local_lm"})
"""
    assert in_fresh_interpreter(code) == "AsynDBT True set()"


def test_langchain_that_is_missing_is_named_with_the_command_that_installs_it() -> None:
    code = """
sys.modules["langchain_core"] = None
import langchain_asyndbt
try:
    langchain_asyndbt.optimize_chain
except ModuleNotFoundError as error:
    print(error)
"""
    found = in_fresh_interpreter(code, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'integrations'}")
    assert re.fullmatch(
        r"optimize_chain needs langchain_core[\w.]*: pip install 'asyndbt-dspy\[langchain\]'", found
    )


def test_the_version_is_the_distributions() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', project, flags=re.MULTILINE)
    assert found is not None
    assert found[1] == asyndbt_dspy.__version__


def test_both_packages_say_that_they_are_typed() -> None:
    assert (ROOT / "asyndbt_dspy" / "py.typed").exists()
    assert (ROOT / "integrations" / "langchain_asyndbt" / "py.typed").exists()
