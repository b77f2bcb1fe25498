"""10,000 damaged or forged artifacts: refused with a message, or loaded equal to what they say; nothing runs."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import artifact_kit as kit
import dspy
import pytest

from asyndbt_dspy.deploy import artifact, load_artifact, manifest, read_artifact, save_artifact
from asyndbt_dspy.deploy.fingerprints import sha256_of
from asyndbt_dspy.deploy.manifest import MANIFEST, PROGRAM, pretty_json, seal
from asyndbt_dspy.errors import ArtifactError

MUTATIONS = 10_000
TRAP = "artifact_trap"
HOSTILE: list[Any] = [
    None, True, -1, 0.5, 10**400, "", "x" * 1000, "\u0000", "__class__", "{}", [], {}, [[]], [None], {"a": 1},
    f"{TRAP}.Trap", {"_dspy_lm_class": f"{TRAP}.Trap", "model": "m"}, "\ud800",
    {"class": f"{TRAP}:Trap", "state": {}}, {"__reduce__": [f"{TRAP}.Trap", []]},
]  # fmt: skip


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a file when it is imported: proof that something of the artifact ran."""
    sprung = tmp_path / "sprung"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / f"{TRAP}.py").write_text(f"open({str(sprung)!r}, 'w').close()\nclass Trap: pass\n")
    monkeypatch.syspath_prepend(str(folder))
    return sprung


def test_mutated_artifacts_are_refused_or_loaded_equal(
    tmp_path: Path, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {kind: kit.tuned(kind) for kind in kit.KINDS}
    saved["two_steps"].summarize.lm = dspy.LM("openai/gpt-4o-mini", temperature=0.3)
    paths = {kind: save_artifact(program, tmp_path / kind) for kind, program in saved.items()}
    students = {kind: make() for kind, make in kit.KINDS.items()}
    files = {kind: {file.name: file.read_bytes() for file in path.iterdir()} for kind, path in paths.items()}
    # From memory: 10,000 times four files through the disk would take minutes. test_artifact.py goes through it.
    current: dict[str, bytes] = {}
    for module in (artifact, manifest):
        monkeypatch.setattr(module, "read_file", lambda folder, name: current[name])
    random_numbers = random.Random(7)
    loaded, refused, reasons = 0, 0, set()
    for number in range(MUTATIONS):
        kind = list(paths)[number % len(paths)]
        original = {name: files[kind][name] for name in (PROGRAM, MANIFEST)}
        forged = (damaged if number % 2 else forged_state)(original, random_numbers)
        current.clear()
        current.update({**files[kind], **forged})
        try:
            program = load_artifact(paths[kind], students[kind])
        except ArtifactError as error:
            refused += 1
            reasons.add(str(error).strip()[:40])
        else:
            loaded += 1
            said = read_artifact(paths[kind]).state
            for name, predictor in program.named_predictors():
                assert held_by(predictor, said[name]) == said[name], "what was loaded is what the file says"
    assert not trap.exists(), "code named by an artifact was run"
    assert TRAP not in sys.modules
    assert "" not in reasons, "a refusal says why"
    assert len(reasons) > 20
    assert refused > MUTATIONS / 2
    assert loaded > 20, "the forger must also make artifacts that pass, or the comparison above tests nothing"


def held_by(predictor: dspy.Predict, said: dict[str, Any]) -> dict[str, Any]:
    """DSPy's state of a loaded predictor; of its LM, the settings that the file names."""
    state = json.loads(json.dumps(predictor.dump_state()))
    if said["lm"] is not None:
        state["lm"] = {key: state["lm"].get(key) for key in said["lm"]}
    return state


def damaged(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """Bytes changed, removed, repeated or inserted, hashes left as they are."""
    name = rng.choice(sorted(files))
    content = bytearray(files[name])
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randrange(1, 30))
    kind = rng.randrange(4)
    if kind == 0:
        content[start] = rng.randrange(256)
    elif kind == 1:
        del content[start:end]
    elif kind == 2:
        content[start:start] = content[start:end]
    else:
        content[start:start] = rng.choice([b'"', b"{", b"[" * 5000, b"\xff", b"\x00", b"NaN", b"1e999"])
    return {**files, name: bytes(content)}


def forged_state(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """The content changed and every hash made to fit, as someone with a text editor and our code would."""
    state, manifest = (json.loads(files[name]) for name in (PROGRAM, MANIFEST))
    target = state if rng.random() < 0.8 else manifest
    for _ in range(rng.randrange(1, 3)):
        forge(target, rng)
    try:
        content = pretty_json(state)
        if isinstance(manifest.get("files"), dict):
            manifest["files"][PROGRAM] = sha256_of(content)
        manifest.pop("sha256", None)
        return {PROGRAM: content, MANIFEST: pretty_json(seal(manifest))}
    except (ValueError, TypeError):
        # A value that JSON or UTF-8 cannot hold: written the crooked way.
        return {**files, PROGRAM: json.dumps(state, default=str).encode()}


def forge(value: Any, rng: random.Random) -> None:
    """Change one place somewhere inside ``value``."""
    while True:
        inside = [
            v
            for v in (value.values() if isinstance(value, dict) else value)
            if isinstance(v, dict | list) and v
        ]
        if not inside or rng.random() < 0.3:
            break
        value = rng.choice(inside)
    changes: list[Callable[[], None]] = []
    replacement = copy.deepcopy(rng.choice(HOSTILE))
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        changes = [
            lambda: value.__setitem__(key, replacement),
            lambda: value.pop(key) and None,
            lambda: value.__setitem__(
                rng.choice(["forward", "__class__", "callbacks", "lm", "engine"]), replacement
            ),
            lambda: value.__setitem__(key, f"{value[key]}!" if isinstance(value[key], str) else replacement),
        ]
    elif value:
        place = rng.randrange(len(value))
        changes = [
            lambda: value.__setitem__(place, replacement),
            lambda: value.append(replacement),
            lambda: value.reverse(),
        ]
    if changes:
        rng.choice(changes)()
