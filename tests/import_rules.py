"""Reads the imports of every module from its source, and says which break the rules of the architecture.

A *part* is a package or a module with a row of its own in `PARTS`; a module belongs to the part with the longest
matching name. Every import counts, also inside functions, under ``TYPE_CHECKING`` and by ``import_module("…")``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ERRORS = "asyndbt_dspy.errors"
PUBLIC = frozenset(
    {
        "asyndbt_dspy",
        ERRORS,
        "asyndbt_dspy.deploy",
        "asyndbt_dspy.lms.local",
        "asyndbt_dspy.simulation",
        "asyndbt_dspy.testing",
    }
)
ANY = frozenset({"*"})
CORE = "asyndbt_dspy.core"
CLI = "asyndbt_dspy.cli"


@dataclass(frozen=True)
class Part:
    """What the modules of one part may import beside the standard library, their own part and `errors`.

    Attributes:
        ours: Parts or modules of this project; with ``public``, only names that their ``__all__`` lists.
        libraries: Third-party packages.
        public: The part stands outside of the package and sees its public names only.
    """

    ours: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset()
    public: bool = False


def _part(*ours: str, libraries: str = "", public: bool = False) -> Part:
    return Part(frozenset(ours), frozenset(libraries.split()), public)


DSPY = "dspy pydantic pydantic_core"  # DSPy's signatures and types are pydantic's
LM = f"numpy tqdm {DSPY} litellm aiolimiter asyncio_throttle"
WHOLE_PACKAGE = _part("asyndbt_dspy", libraries=f"numpy tqdm {DSPY}")
INTEGRATIONS = ("langchain_asyndbt", "mlflow_asyndbt", "flower_asyndbt")

PARTS = {
    "asyndbt_dspy": _part("asyndbt_dspy"),  # its __init__ only: the lazy names
    ERRORS: _part(),
    CORE: _part(libraries="numpy"),
    "asyndbt_dspy.engines": _part(CORE, libraries="numpy"),
    "asyndbt_dspy.engines.ray": _part("asyndbt_dspy.engines", CORE, libraries="numpy ray"),
    "asyndbt_dspy.lms": _part(CORE, libraries=LM),
    "asyndbt_dspy.lms.local": _part(
        "asyndbt_dspy.lms", CORE, libraries=f"{LM} torch transformers tokenizers safetensors gguf llguidance"
    ),
    "asyndbt_dspy.programs": _part(CORE, libraries=f"numpy {DSPY}"),
    # An evaluation checks its examples, reads the metric and tells errors apart as a compile does.
    "asyndbt_dspy.deploy": _part(
        "asyndbt_dspy.programs.checks",
        "asyndbt_dspy.programs.metrics",
        "asyndbt_dspy.lms.failures",
        CORE,
        libraries=DSPY,
    ),
    "asyndbt_dspy.runs": _part(CORE, libraries="tqdm filelock"),
    "asyndbt_dspy.simulation": _part(
        "asyndbt_dspy.runs", "asyndbt_dspy.testing", "asyndbt_dspy.engines", CORE, libraries="numpy"
    ),
    "asyndbt_dspy.testing": _part(CORE, "asyndbt_dspy.engines.protocols", libraries="numpy"),
    "asyndbt_dspy.optimizer": WHOLE_PACKAGE,
    "asyndbt_dspy.bootstrapping": WHOLE_PACKAGE,
    "asyndbt_dspy.choices": WHOLE_PACKAGE,
    "asyndbt_dspy.compilation": WHOLE_PACKAGE,
    "asyndbt_dspy.later_instructions": WHOLE_PACKAGE,
    "asyndbt_dspy.metering": WHOLE_PACKAGE,
    "asyndbt_dspy.preparation": WHOLE_PACKAGE,
    "asyndbt_dspy.remote": WHOLE_PACKAGE,
    "asyndbt_dspy.settings": WHOLE_PACKAGE,
    "asyndbt_dspy.setup_rollouts": WHOLE_PACKAGE,
    "asyndbt_dspy.sharding": WHOLE_PACKAGE,
    "asyndbt_dspy.splitting": WHOLE_PACKAGE,
    "asyndbt_dspy.recording": WHOLE_PACKAGE,
    "asyndbt_dspy.reporting": WHOLE_PACKAGE,
    "asyndbt_dspy.race_share": WHOLE_PACKAGE,
    "asyndbt_dspy.stopping": WHOLE_PACKAGE,
    "asyndbt_dspy.workers": WHOLE_PACKAGE,
    CLI: WHOLE_PACKAGE,
    "langchain_asyndbt": _part(*PUBLIC, libraries=f"langchain_core {DSPY}", public=True),
    "mlflow_asyndbt": _part(*PUBLIC, libraries=f"mlflow {DSPY}", public=True),
    "flower_asyndbt": _part(*PUBLIC, libraries=f"flwr numpy {DSPY}", public=True),
    "examples": _part(*PUBLIC, *INTEGRATIONS, libraries=f"{DSPY} langchain_core langgraph", public=True),
    "benchmarks": Part(PUBLIC | set(INTEGRATIONS), ANY, public=True),
}

# Agreed exceptions: (importer, imported, why). One that nothing uses any more fails the test.
AGREED = (
    ("asyndbt_dspy.programs", "asyndbt_dspy.lms.failures", "the classification of errors has one home"),
    ("asyndbt_dspy.programs", "asyndbt_dspy.lms.distributions", "cross-entropy needs a label's probability"),
    ("asyndbt_dspy.programs", "asyndbt_dspy.lms.attempts", "whether an LM can be called from the event loop"),
    ("asyndbt_dspy.programs", "asyndbt_dspy.lms.call_watch", "a rollout hears of calls that came to nothing"),
    ("asyndbt_dspy.programs", "asyndbt_dspy.lms.callers", "says for which worker a rollout calls its LM"),
    ("asyndbt_dspy.runs", "asyndbt_dspy.engines.protocols", "observers receive the engines' recorded events"),
    ("benchmarks", "asyndbt_dspy.lms.local", "they measure inside the engine"),
    ("benchmarks.journal", "asyndbt_dspy.recording.recorder", "it measures the recorder itself"),
    ("benchmarks.journal", "asyndbt_dspy.programs", "it records rollouts"),
    ("benchmarks.ray_cluster", "asyndbt_dspy.runs.journal", "it counts what was recorded"),
    ("benchmarks.journal", "asyndbt_dspy.runs.run_directory", "it opens the run_dir"),
    ("benchmarks", "asyndbt_dspy.testing.provider", "they run against it over a real socket"),
    ("benchmarks", "asyndbt_dspy.lms.distributions", "they compare label probabilities"),
    ("benchmarks.crossed", "asyndbt_dspy.programs.rollout", "it scores single rollouts, with their margins"),
    (
        "benchmarks.quality_bench.summary",
        "asyndbt_dspy.core.racing",
        "it holds recorded races to the race's own bar",
    ),
    ("benchmarks.accept_score", "asyndbt_dspy.core.racing", "it reckons errors as the race does"),
)

# Asynchrony, threads, processes, the clock, files, logs and the shared RNG: none of it in the core.
IMPURE = (
    "asyncio threading _thread concurrent multiprocessing subprocess signal selectors socket time datetime sched "
    "logging warnings random secrets os io pathlib shutil tempfile contextvars"
)
OWN_STREAMS = frozenset(
    {"BitGenerator", "Generator", "PCG64", "PCG64DXSM", "Philox", "SeedSequence", "default_rng"}
)
MAX_LINES = 500
MAX_FUNCTION_LINES = 80


@dataclass(frozen=True)
class Import:
    """One imported module (``name`` is None) or one name of a module, and the line that does it."""

    module: str
    name: str | None
    line: int


@dataclass
class Project:
    """The modules under a root folder: the package, `integrations`, `examples` and `benchmarks`."""

    root: Path
    used: set[tuple[str, str, str]] = field(default_factory=set)

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Dotted name -> file. Packages of `integrations` are imported under their own names."""
        found: dict[str, Path] = {}
        for top in ("asyndbt_dspy", "integrations", "examples", "benchmarks"):
            for path in sorted((self.root / top).rglob("*.py")):
                parts = path.relative_to(self.root).with_suffix("").parts
                parts = parts[1:] if top == "integrations" else parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.modules.items()}

    def where(self, module: str, line: int) -> str:
        return f"{self.modules[module].relative_to(self.root)}:{line}"

    def breaches(self) -> list[str]:
        """Every breach as one line of text; empty where all rules hold. Fills `used`."""
        found: list[str] = []
        for module, tree in self.trees.items():
            found += self._import_breaches(module, tree)
            found += self._print_breaches(module, tree)
            found += self._core_breaches(module, tree) if _within(module, CORE) else ()
            found += self._length_breaches(module, tree)
            lines = len(self.modules[module].read_text(encoding="utf-8").splitlines())
            if lines > MAX_LINES:
                found.append(f"{self.where(module, lines)} has more than {MAX_LINES} lines; split it")
        return found

    def _import_breaches(self, module: str, tree: ast.Module) -> Iterator[str]:
        owner = part_of(module)
        if owner is None:
            yield f"{self.where(module, 1)} belongs to no part; give {module} a row in tests/import_rules.py"
            return
        for found in self.imports(module, tree):
            reason = self._reason(module, owner, found)
            if reason:
                target = found.module if found.name is None else f"{found.module}.{found.name}"
                yield f"{self.where(module, found.line)} imports {target}: {reason}"

    def _reason(self, module: str, owner: str, found: Import) -> str | None:
        """Why this import breaks a rule, or None."""
        part = PARTS[owner]
        top = found.module.split(".")[0]
        if top not in {name.split(".")[0] for name in (*PARTS, *self.modules)}:
            if top in sys.stdlib_module_names:
                pure = not _within(module, CORE) or top not in IMPURE.split()
                return None if pure else f"the core does without {top}"
            allowed = top in part.libraries or part.libraries == ANY
            return None if allowed else f"{owner} may use {' '.join(sorted(part.libraries)) or 'no library'}"
        if part_of(found.module) == owner or found.module == ERRORS:
            return None
        if (found.module, found.name) == ("asyndbt_dspy", "__version__"):
            return None
        for exception in AGREED:
            if _within(module, exception[0]) and _within(found.module, exception[1]):
                self.used.add(exception)
                return None
        if part.public:
            return self._public_reason(owner, part, found)
        if found.module != "asyndbt_dspy" and any(_within(found.module, name) for name in part.ours):
            return None
        return f"{owner} may import {', '.join(sorted(part.ours)) or 'nothing of ours'}"

    def _public_reason(self, owner: str, part: Part, found: Import) -> str | None:
        if found.module not in part.ours and not any(_within(found.module, name) for name in INTEGRATIONS):
            return f"{owner} sees only public names"
        if found.module not in part.ours:
            return None if owner in ("examples", "benchmarks") else "an integration does without the others"
        listed = _listed(self.trees.get(found.module))
        if found.name is None or listed is None or found.name in listed:
            return None
        return f"{found.module} does not list {found.name} in __all__"

    def imports(self, module: str, tree: ast.Module) -> Iterator[Import]:
        """Every import of a module, names of packages resolved to modules where there is such a file."""
        is_package = self.modules[module].name == "__init__.py"
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, None, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = module.split(".")
                    above = above[: len(above) - node.level + is_package]
                    base = ".".join([*above, *([base] if base else [])])
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    known = inner in self.modules
                    yield Import(inner if known else base, None if known else alias.name, node.lineno)
            elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__", "find_spec"):
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield Import(first.value, None, node.lineno)

    def _length_breaches(self, module: str, tree: ast.Module) -> Iterator[str]:
        """Functions that do more than one thing. Their signature and docstring do not count."""
        if part_of(module) in ("examples", "benchmarks"):
            return
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[ast.get_docstring(node) is not None :] or node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    yield f"{self.where(module, node.lineno)} {node.name} has {lines} lines; split it"

    def _print_breaches(self, module: str, tree: ast.Module) -> Iterator[str]:
        if part_of(module) in ("examples", "benchmarks") or module == CLI:
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{self.where(module, node.lineno)} prints; only cli.py does"

    def _core_breaches(self, module: str, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("open", "input")
            ):
                yield f"{self.where(module, node.lineno)} calls {node.func.id}; the core touches no files"
            if not isinstance(node, ast.Attribute) or node.attr in OWN_STREAMS:
                continue
            if ast.unparse(node.value) in ("np.random", "numpy.random"):
                yield f"{self.where(module, node.lineno)} uses the shared RNG np.random.{node.attr}"


def part_of(module: str) -> str | None:
    """The part that a module belongs to: the longest matching name, the bare package for its `__init__` only."""
    matching = [
        name for name in PARTS if _within(module, name) and (name != "asyndbt_dspy" or module == name)
    ]
    return max(matching, key=len, default=None)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _listed(tree: ast.Module | None) -> set[str] | None:
    """What a module's ``__all__`` lists, or None where it has none."""
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return None
