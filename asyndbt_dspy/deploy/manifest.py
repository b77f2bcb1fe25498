"""The manifest of an artifact: what was saved, made by whom, of what; and the checks before anything is loaded.

``program.json`` is the only file that loading uses. All files are JSON or text and are named in the manifest
with their hashes. A hash finds accidents and mix-ups, not forgery: sign the folder where that matters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyndbt_dspy.deploy.fingerprints import canonical_json, sha256_of
from asyndbt_dspy.errors import ArtifactError

FORMAT = "asyndbt-artifact"
FORMAT_VERSION = 1
MANIFEST, PROGRAM, PROMPT, MESSAGES = "manifest.json", "program.json", "prompt.md", "messages.json"
FILES = (PROGRAM, PROMPT, MESSAGES)
MAX_FILE_BYTES = 256 * 1024 * 1024

OBJECT_KEYS = ("signature", "files", "versions", "adapter", "lms")
OPTIONAL_OBJECT_KEYS = ("data", "scores", "budget")


def pretty_json(value: Any, sort_keys: bool = True) -> bytes:
    """The one form in which the JSON files are written."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its own hash, which is also the artifact's id."""
    return {**manifest, "sha256": _own_hash(manifest)}


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of one file of an artifact.

    Raises:
        ArtifactError: missing, unreadable, no plain file, or larger than 256 MiB.
    """
    path = folder / name
    try:
        if not path.is_file():
            raise ArtifactError(
                f"{name} is missing; an artifact is a folder with {MANIFEST}, {', '.join(FILES)}"
            )
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ArtifactError(f"{name} has {size} bytes; the largest that is read is {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{name} cannot be read: {error.strerror or error}") from error


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """A JSON object: UTF-8, no key twice, no NaN or infinity.

    Raises:
        ArtifactError: anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("an object has a key twice")
        return dict(pairs)

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"the number {text[:20]} is too large")
        return value

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is no JSON number")

    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=unique, parse_float=number, parse_constant=constant
        )
        # A lone surrogate, written as \ud800, is legal JSON and no text that any LM can be sent.
        canonical_json(value).decode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} is not the JSON that was written: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{name} must hold a JSON object, found {type(value).__name__}")
    return value


def check_manifest(content: bytes) -> dict[str, Any]:
    """The manifest, if it is one of ours, unchanged, and not newer than this package.

    Raises:
        ArtifactError: says what differs.
    """
    manifest = parse_json(content, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{MANIFEST}: format is {str(manifest.get('format'))[:60]!r}, expected {FORMAT!r}"
        )
    version = manifest.get("format_version")
    if type(version) is not int or not version >= 1:
        raise ArtifactError(
            f"{MANIFEST}: format_version is {str(version)[:60]!r}, expected 1..{FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{MANIFEST}: format_version is {version}; this version of asyndbt-dspy reads up to {FORMAT_VERSION}. "
            "Install a newer asyndbt-dspy"
        )
    if manifest.get("sha256") != _own_hash(manifest) or content != pretty_json(manifest):
        raise ArtifactError(f"{MANIFEST} was changed after it was written: its hash does not fit its content")
    _check_shape(manifest)
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """The bytes of the files that the manifest names.

    Raises:
        ArtifactError: names the files whose hashes differ.
    """
    hashes = manifest["files"]
    contents = {name: read_file(folder, name) for name in FILES}
    changed = [name for name in FILES if sha256_of(contents[name]) != hashes.get(name)]
    if changed:
        raise ArtifactError(
            f"changed after they were written: {', '.join(changed)}",
            tuple(f"{name}: SHA-256 differs from the manifest" for name in changed),
        )
    return contents


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return sha256_of(canonical_json({key: value for key, value in manifest.items() if key != "sha256"}))


def _check_shape(manifest: Mapping[str, Any]) -> None:
    for key in OBJECT_KEYS:
        if not isinstance(manifest.get(key), dict):
            raise ArtifactError(f"{MANIFEST}: {key!r} must be an object")
    for key in OPTIONAL_OBJECT_KEYS:
        if not isinstance(manifest.get(key), dict | None):
            raise ArtifactError(f"{MANIFEST}: {key!r} must be an object or null")
    predictors = manifest["signature"].get("predictors")
    if not isinstance(predictors, dict) or not all(isinstance(p, dict) for p in predictors.values()):
        raise ArtifactError(f"{MANIFEST}: signature.predictors must map names to objects")
    for name, record in predictors.items():
        for side in ("inputs", "outputs"):
            fields = record.get(side)
            if not isinstance(fields, list) or not all(
                isinstance(f, dict) and isinstance(f.get("name"), str) and isinstance(f.get("type"), str)
                for f in fields
            ):
                raise ArtifactError(f"{MANIFEST}: signature of {name[:60]!r}: {side!r} must list fields")
    records = manifest["lms"].get("predictors")
    if not isinstance(records, dict) or not all(isinstance(r, dict | None) for r in records.values()):
        raise ArtifactError(f"{MANIFEST}: lms.predictors must map names to objects or null")
    if not isinstance(manifest["adapter"].get("class"), str):
        raise ArtifactError(f"{MANIFEST}: adapter.class must be a string")
