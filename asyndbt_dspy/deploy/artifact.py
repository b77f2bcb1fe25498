"""Save a program as a folder of JSON and text, and load it again, without ever running anything from it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dspy

from asyndbt_dspy.deploy.fingerprints import data_record, program_record, sha256_of
from asyndbt_dspy.deploy.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MESSAGES,
    PROGRAM,
    PROMPT,
    check_files,
    check_manifest,
    parse_json,
    pretty_json,
    read_file,
    seal,
)
from asyndbt_dspy.deploy.markdown import prompt_markdown
from asyndbt_dspy.deploy.prompts import export_prompt
from asyndbt_dspy.deploy.public_state import (
    adapter_record,
    check_no_secret,
    config_record,
    known_secrets,
    lm_record,
    program_state,
    public_model_id,
    states_by_predictor,
)
from asyndbt_dspy.deploy.rebuild import program_class, rebuilt_program
from asyndbt_dspy.deploy.result_summary import summarize_result
from asyndbt_dspy.deploy.state_checks import check_state
from asyndbt_dspy.errors import ArtifactError, ConfigurationError, ExportError

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Artifact:
    """An artifact that was read and checked, but not loaded into a program.

    Attributes:
        manifest: Content of ``manifest.json``.
        state: DSPy's state of each predictor, by name (``program.json``).
        messages: Content of ``messages.json``: by predictor, the entries that ``fill_messages`` takes.
    """

    manifest: Mapping[str, Any]
    state: Mapping[str, Any]
    messages: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The SHA-256 that names this version; another artifact's ``parent`` may be it."""
        return str(self.manifest["sha256"])


def save_artifact(
    program: dspy.Module,
    path: PathLike,
    *,
    result: Any = None,
    trainset: Iterable[dspy.Example] | None = None,
    valset: Iterable[dspy.Example] | None = None,
    adapter: dspy.Adapter | None = None,
    lm: dspy.BaseLM | None = None,
    parent: PathLike | None = None,
) -> Path:
    """Write ``program`` to the folder ``path``: ``program.json``, ``manifest.json``, ``prompt.md``,
    ``messages.json``.

    ``program.json`` is what ``dspy.Module.load`` reads. Keys, addresses and paths are never written; settings
    of an LM that are left out are named in the manifest, and such an LM must be given again when loading.

    Args:
        program: For instance what ``AsynDBT.compile`` returned. Not changed.
        path: Must not exist, or be an empty folder. It appears whole or not at all.
        result: ``optimizer.result`` or its ``to_dict()``; its scores, intervals and spending go into the manifest.
        trainset: Only its hash and length are written.
        valset: As ``trainset``.
        adapter: The prompt format it was optimized with; default: that of ``dspy.settings``.
        lm: The LM of predictors without an own one; default: that of ``dspy.settings``.
        parent: The artifact that this one replaces.

    Raises:
        ArtifactError: the folder is taken, a demo does not survive JSON, or a file would hold a secret.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(
            "the folder to write to is not empty; artifacts are never overwritten, choose a new one"
        )
    adapter = adapter or _current_adapter()
    lm = lm or dspy.settings.lm
    if not program.named_predictors():
        raise ArtifactError(f"{type(program).__name__} has no predictors, so there is nothing to save")
    state = program_state(program)
    states = states_by_predictor(state, dict(program.named_predictors()))
    _check_survives(program, states, adapter)
    files = {
        PROGRAM: _json_file(state, PROGRAM),
        PROMPT: prompt_markdown(states).encode("utf-8", "replace"),
        MESSAGES: _json_file(_all_messages(program, adapter), MESSAGES),
    }
    manifest = {
        **_origin(program, adapter, lm),
        "files": {name: sha256_of(content) for name, content in files.items()},
        "data": _data(trainset, valset),
        **summarize_result(result),
        "parent": read_artifact(parent).id if parent is not None else None,
    }
    files[MANIFEST] = _json_file(seal(manifest), MANIFEST)
    lms = [lm, *(predictor.lm for _, predictor in program.named_predictors())]
    check_no_secret(files, known_secrets(item for item in lms if item is not None))
    _write(folder, files)
    return folder


def read_artifact(path: PathLike) -> Artifact:
    """Read an artifact and check that it is whole, unchanged and not newer than this package.

    Raises:
        ArtifactError: says what differs.
    """
    folder = Path(path)
    manifest = check_manifest(read_file(folder, MANIFEST))
    contents = check_files(folder, manifest)
    fields = {
        name: [field["name"] for side in ("inputs", "outputs") for field in record[side]]
        for name, record in manifest["signature"]["predictors"].items()
    }
    program = parse_json(contents[PROGRAM], PROGRAM)
    if not isinstance(program.get("metadata"), dict | None):
        raise ArtifactError(f"{PROGRAM}: 'metadata' must be an object")
    state = states_by_predictor(program, fields)
    check_state(state, fields)
    return Artifact(manifest, state, parse_json(contents[MESSAGES], MESSAGES))


def load_artifact(
    path: PathLike,
    student: dspy.Module | None = None,
    *,
    lms: Mapping[str, dspy.BaseLM] | None = None,
) -> dspy.Module:
    """The saved program: a copy of ``student`` with the saved instructions, demos and LMs.

    The prompt format is no part of a DSPy program, but demos may be made for one (``demo_ending``) and scores hold for one:
    a warning is logged where ``dspy.settings`` has another adapter than the manifest names.

    Args:
        path: The artifact's folder.
        student: A program of the same structure, not changed. May be left out for a saved ``dspy.Predict`` or
            ``dspy.ChainOfThought`` with fields of plain types. A predictor's own settings (``dspy.Predict(…,
            temperature=0.7)``) are the student's; without one they are those that were saved.
        lms: LMs by predictor. Needed for those that cannot be rebuilt from an artifact (an engine of one's own,
            an address, extra headers), unless the student's predictor has an LM of the same name.

    Raises:
        ArtifactError: the artifact was changed, is newer than this package, fits another signature, or has an
            LM of an unknown class. The message says what differs.
        ConfigurationError: ``lms`` names a predictor that there is not.
    """
    artifact = read_artifact(path)
    if student is None:
        student = rebuilt_program(artifact.manifest)
    _check_signature(artifact.manifest, student)
    _warn_of_another_adapter(artifact.manifest, student)
    program = student.deepcopy()
    own = {name: predictor.lm for name, predictor in student.named_predictors()}
    unknown = sorted(set(lms or {}) - set(own))
    if unknown:
        raise ConfigurationError(f"lms names {unknown}, but the program's predictors are {sorted(own)}")
    chosen = {name: _external_lm(name, artifact.manifest, own[name], lms or {}) for name in own}
    try:
        for name, predictor in program.named_predictors():
            predictor.load_state(dict(artifact.state[name]))
    except Exception as error:
        # Whatever DSPy or pydantic make of a state that passed our checks, the reader gets a reason.
        raise ArtifactError(
            f"{PROGRAM} cannot be loaded: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    for name, predictor in program.named_predictors():
        # As dictionaries: a field may have the name of an argument (`base`).
        predictor.demos = [dspy.Example(demo) for demo in predictor.demos]
        predictor.lm = chosen[name] or predictor.lm
    return program


def _current_adapter() -> dspy.Adapter:
    return dspy.settings.adapter or dspy.ChatAdapter()


def _warn_of_another_adapter(manifest: Mapping[str, Any], program: dspy.Module) -> None:
    saved, current = manifest["adapter"]["class"], type(_current_adapter()).__name__
    if saved != current and not callable(getattr(program, "prompt_adapter", None)):
        logger.warning(
            "The artifact was saved under %.100s, and dspy.settings has %s: its prompts are not those that were optimized and "
            "scored, and its demos may ask for another format than the last turn. Set the adapter before loading and "
            "running: dspy.configure(adapter=…).",
            saved,
            current,
        )


def _check_signature(manifest: Mapping[str, Any], student: dspy.Module) -> None:
    saved, present = manifest["signature"], program_record(student)
    if saved.get("sha256") == present["sha256"] and saved["predictors"] == present["predictors"]:
        return
    differences = _signature_differences(saved["predictors"], present["predictors"])
    said = "; ".join(differences) or "the hashes differ"
    raise ArtifactError(f"the artifact fits another program: {said}", tuple(differences))


def _signature_differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    if list(saved) != list(present) and set(saved) != set(present):
        return [f"saved predictors are {sorted(saved)}, the student has {sorted(present)}"]
    differences = []
    for name, record in saved.items():
        for side in ("inputs", "outputs"):
            old, new = record[side], present[name][side]
            if old != new:
                differences.append(f"{side} of {name!r} were {_fields(old)}, now {_fields(new)}")
    return differences


def _fields(fields: Iterable[Mapping[str, Any]]) -> str:
    return "(" + ", ".join(f"{field['name']}: {field['type']}"[:80] for field in fields) + ")"


def _external_lm(
    name: str, manifest: Mapping[str, Any], own: Any, given: Mapping[str, dspy.BaseLM]
) -> dspy.BaseLM | None:
    """The LM that the loaded predictor gets from outside, ``None`` for what the state says."""
    if name in given:
        return given[name]
    record = manifest["lms"]["predictors"].get(name)
    if record is None or record.get("rebuilt") is True:
        return None
    if own is not None and public_model_id(str(getattr(own, "model", ""))) == record.get("model"):
        return own  # type: ignore[no-any-return]
    raise ArtifactError(
        f"predictor {name!r} was saved with LM {str(record.get('model'))[:100]!r}, which an artifact cannot "
        f"rebuild (not written: {record.get('left_out')}); give it: load_artifact(..., lms={{{name!r}: lm}})"
    )


def _check_survives(program: dspy.Module, state: Mapping[str, Any], adapter: dspy.Adapter) -> None:
    """Refuse a program whose prompts would change by being written as JSON (tuples, sets, models in demos)."""
    reread = parse_json(_json_file(state, PROGRAM), PROGRAM)
    for name, predictor in program.named_predictors():
        used = _adapter_of(program, name, adapter)
        # A predictor that the adapter cannot format would fail in use as well, saved or not.
        written = used.format_demos(predictor.signature, [dict(demo) for demo in predictor.demos])
        if written != used.format_demos(predictor.signature, reread[name]["demos"]):
            raise ArtifactError(
                f"predictor {name!r}: a demo has a value that JSON does not keep as it is (a tuple, a model, a custom "
                "type); write it as text or as plain JSON values"
            )


def _adapter_of(program: dspy.Module, predictor: str, default: dspy.Adapter) -> dspy.Adapter:
    """A program may bring a prompt format of its own: ``prompt_adapter(predictor_name)``."""
    own = getattr(program, "prompt_adapter", None)
    return own(predictor) if callable(own) else default


def _all_messages(program: dspy.Module, adapter: dspy.Adapter) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, _ in program.named_predictors():
        try:
            entries[name] = export_prompt(
                program, name, adapter=_adapter_of(program, name, adapter)
            ).to_json()
        except ExportError as error:
            entries[name] = {"refused": str(error)}
    return entries


def _origin(program: dspy.Module, adapter: Any, lm: Any) -> dict[str, Any]:
    """What was saved, and what it was made with."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "program": program_class(program),
        "signature": program_record(program),
        "versions": {"dspy": dspy.__version__, "asyndbt-dspy": _package_version()},
        "adapter": adapter_record(adapter),
        "config": {
            name: record
            for name, predictor in program.named_predictors()
            if (record := config_record(predictor)) is not None
        },
        "lms": {
            "default": lm_record(lm).to_json() if lm is not None else None,
            "predictors": {
                name: lm_record(predictor.lm).to_json() if predictor.lm is not None else None
                for name, predictor in program.named_predictors()
            },
        },
    }


def _data(trainset: Iterable[Any] | None, valset: Iterable[Any] | None) -> dict[str, Any] | None:
    sets = {"trainset": trainset, "valset": valset}
    given = {name: data_record(examples) for name, examples in sets.items() if examples is not None}
    return given or None


def _json_file(value: Any, name: str) -> bytes:
    try:
        # A prompt shows the keys of a demo's dictionary in their order, which loading has to give back.
        return pretty_json(value, sort_keys=name != PROGRAM)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{name} cannot be written as JSON: {str(error)[:200]}") from error


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    parent = folder.absolute().parent
    building = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".artifact-", dir=parent))
        for name, content in files.items():
            (building / name).write_bytes(content)
        building.chmod(0o755)
        os.replace(building, folder)
    except OSError as error:
        raise ArtifactError(f"the artifact cannot be written: {error.strerror or error}") from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)


def _package_version() -> str:
    try:
        return version("asyndbt-dspy")
    except PackageNotFoundError:
        return "unknown"
