"""Who may import whom, what the core does without, and that the checker would see a breach."""

from __future__ import annotations

from pathlib import Path

import pytest
from import_rules import AGREED, PARTS, Project

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> Project:
    return Project(ROOT)


def test_no_module_breaks_a_rule(project: Project) -> None:
    breaches = project.breaches()
    assert not breaches, "\n" + "\n".join(breaches)


def test_the_checker_reads_the_whole_tree(project: Project) -> None:
    for module in (
        "asyndbt_dspy",
        "asyndbt_dspy.core.server",
        "asyndbt_dspy.lms.local.engine",
        "examples.support_desk",
    ):
        assert module in project.modules
    assert any(module.startswith("langchain_asyndbt.") for module in project.modules)
    assert any(module.startswith("benchmarks.") for module in project.modules)
    imported = {
        found.module
        for found in project.imports("asyndbt_dspy.compilation", project.trees["asyndbt_dspy.compilation"])
    }
    assert {"dspy", "asyndbt_dspy.core.server", "asyndbt_dspy.runs.result"} <= imported


def test_every_agreed_exception_is_still_needed(project: Project) -> None:
    project.breaches()
    unused = [exception for exception in AGREED if exception not in project.used]
    assert not unused, f"no module needs these any more, remove them from AGREED: {unused}"


def test_the_package_ships_every_integration() -> None:
    shipped = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = [path.parent for path in (ROOT / "integrations").glob("*/__init__.py")]
    assert folders
    for folder in folders:
        assert folder.name in PARTS
        assert f'"integrations/{folder.name}"' in shipped, f"{folder.name} is not in the wheel"


def check(root: Path, file: str, source: str) -> list[str]:
    """The breaches of a small tree that holds `file` with `source` beside a few well-behaved modules."""
    tree = {
        "asyndbt_dspy/__init__.py": '__all__ = ["AsynDBT"]\n',
        "asyndbt_dspy/errors.py": "",
        "asyndbt_dspy/optimizer.py": "import dspy\n",
        "asyndbt_dspy/core/__init__.py": "",
        "asyndbt_dspy/core/server.py": "import numpy as np\nfrom asyndbt_dspy.errors import ProtocolError\n",
        "asyndbt_dspy/engines/local.py": "import asyncio\nfrom asyndbt_dspy.core.server import ServerState\n",
        "asyndbt_dspy/deploy/__init__.py": '__all__ = ["export_prompt"]\n',
        "integrations/langchain_asyndbt/__init__.py": "from asyndbt_dspy import AsynDBT\n",
        "integrations/mlflow_asyndbt/__init__.py": "from asyndbt_dspy.deploy import export_prompt\n",
        "examples/demo.py": "import langchain_asyndbt\nprint('an example may print')\n",
        "benchmarks/speed.py": "import time, torch\nfrom asyndbt_dspy import AsynDBT\n",
        file: source,
    }
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return Project(root).breaches()


def test_a_well_behaved_tree_has_no_breach(tmp_path: Path) -> None:
    assert (
        check(tmp_path, "asyndbt_dspy/core/cuts.py", "import math\nfrom asyndbt_dspy.core import server\n")
        == []
    )


@pytest.mark.parametrize(
    ("file", "source", "said"),
    [
        ("asyndbt_dspy/core/cuts.py", "import asyncio", "the core does without asyncio"),
        ("asyndbt_dspy/core/cuts.py", "from time import monotonic", "the core does without time"),
        ("asyndbt_dspy/core/cuts.py", "def f():\n    import logging", "cuts.py:2 imports logging"),
        ("asyndbt_dspy/core/cuts.py", "import random", "the core does without random"),
        ("asyndbt_dspy/core/cuts.py", "import threading", "the core does without threading"),
        (
            "asyndbt_dspy/core/cuts.py",
            "import numpy as np\nx = np.random.rand(3)",
            "shared RNG np.random.rand",
        ),
        ("asyndbt_dspy/core/cuts.py", "x = open('plan.json')", "the core touches no files"),
        ("asyndbt_dspy/core/cuts.py", "import scipy.optimize", "asyndbt_dspy.core may use numpy"),
        ("asyndbt_dspy/core/cuts.py", "from ..engines import local", "imports asyndbt_dspy.engines.local"),
        ("asyndbt_dspy/core/cuts.py", "from asyndbt_dspy import AsynDBT", "imports asyndbt_dspy.AsynDBT"),
        ("asyndbt_dspy/core/cuts.py", "import importlib\nimportlib.import_module('dspy')", "imports dspy"),
        ("asyndbt_dspy/engines/ring.py", "import dspy", "asyndbt_dspy.engines may use numpy"),
        ("asyndbt_dspy/engines/ring.py", "if TYPE_CHECKING:\n    import asyndbt_dspy.optimizer", "ring.py:2"),
        (
            "asyndbt_dspy/programs/slots.py",
            "from asyndbt_dspy.engines.local import LocalEngine",
            "may import",
        ),
        ("asyndbt_dspy/lms/metered.py", "import torch", "asyndbt_dspy.lms may use"),
        ("asyndbt_dspy/optimizer.py", "import langchain_asyndbt", "imports langchain_asyndbt"),
        ("asyndbt_dspy/optimizer.py", "print('hello')", "only cli.py does"),
        ("asyndbt_dspy/misc/things.py", "", "belongs to no part"),
        ("asyndbt_dspy/things.py", "", "belongs to no part"),
        ("asyndbt_dspy/core/cuts.py", "x = 1\n" * 501, "more than 500 lines"),
        ("asyndbt_dspy/core/cuts.py", "def f():\n" + "    x = 1\n" * 81, "f has 81 lines; split it"),
        (
            "integrations/langchain_asyndbt/a.py",
            "from asyndbt_dspy.core.server import ServerState",
            "public names",
        ),
        (
            "integrations/langchain_asyndbt/a.py",
            "from asyndbt_dspy.deploy import _secret",
            "does not list _secret",
        ),
        ("integrations/langchain_asyndbt/a.py", "import mlflow_asyndbt", "does without the others"),
        ("integrations/langchain_asyndbt/a.py", "import torch", "langchain_asyndbt may use"),
        ("examples/demo.py", "from asyndbt_dspy.core import server", "examples sees only public names"),
        ("benchmarks/speed.py", "import asyndbt_dspy.optimizer", "benchmarks sees only public names"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, file: str, source: str, said: str) -> None:
    breaches = check(tmp_path, file, source)
    assert len(breaches) == 1
    assert said in breaches[0]
