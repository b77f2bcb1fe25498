"""What of a program may be written down: DSPy's state by an allow-list, never keys, endpoints or paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.utils.saving import get_dependency_versions

from asyndbt_dspy.deploy.fingerprints import jsonable
from asyndbt_dspy.errors import ArtifactError

SELF = "self"
"""The name that DSPy gives to a ``dspy.Predict`` that is the program itself."""

LM_CLASS_KEY = "_dspy_lm_class"
BUILTIN_LM_CLASS = "dspy.clients.lm.LM"

SAMPLING_KEYS = frozenset(
    (
        *("temperature", "top_p", "top_k", "n", "stop", "seed", "max_tokens", "max_completion_tokens"),
        *("presence_penalty", "frequency_penalty", "logprobs", "top_logprobs"),
        *("reasoning_effort", "parallel_tool_calls"),
    )
)
LM_KEYS = SAMPLING_KEYS | {
    LM_CLASS_KEY,
    "model",
    "model_type",
    "cache",
    "num_retries",
    "engine",
    "use_developer_role",
}
ENGINES = ("auto", "lm15", "litellm")
ADAPTER_OPTIONS = ("use_native_function_calling", "use_json_adapter_fallback", "parallel_tool_calls")

KEY_SETTINGS = ("api_key",)
"""Settings that are never written, but that an LM finds again in its environment."""

SECRET_NAME = re.compile(r"(api_?key|token(?!iz)|secret|password|passwd|credential)", re.IGNORECASE)
SECRET_SETTING = re.compile(
    r"((?<!cache_)key(?!word)|token(?!iz)|secret|passw|credential|auth(?:$|[_-]|ori[sz])|cookie|header"  # keys
    r"|_base$|url|uri$|endpoint|host(?:name)?$|proxy|proxies|address"  # addresses
    r"|organi[sz]ation|(?:^|_)org(?:_id)?$|tenant|account|client_id|project_id$|_project$)",  # accounts
    re.IGNORECASE,
)
"""Names of an LM's settings whose values are secret. Those of providers, tiers and models are ordinary words."""
SECRET_MAPPING = re.compile(r"(credential|cookie|header)", re.IGNORECASE)
"""Names of settings of which every value is secret, whatever its name."""
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)
PLAIN_COUNT = re.compile(r"^(max_.*tokens|.*_tokens)$")
MIN_SECRET_CHARACTERS = 8
ORDINARY = re.compile(r"[A-Z]?[a-z]{0,19}|[A-Z]{0,20}|[0-9]{0,11}")
"""Values of environment variables that are a word or a small number (``DB_PASSWORD=password``): any prompt may hold them."""
PATH_OR_ADDRESS = re.compile(r"(://|^[/~\\]|/[/~]|^[A-Za-z]:[\\/]|\\)")


@dataclass(frozen=True)
class LMRecord:
    """What the manifest says about an LM.

    Attributes:
        model: Its id, without paths and addresses.
        sampling: Settings of ``SAMPLING_KEYS`` that are set.
        left_out: Names of the settings that were not written.
        rebuilt: Whether loading makes it again; else whoever loads gives it.
    """

    model: str
    sampling: Mapping[str, Any]
    left_out: tuple[str, ...]
    rebuilt: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "model": self.model,
            "sampling": dict(self.sampling),
            "left_out": list(self.left_out),
            "rebuilt": self.rebuilt,
        }


def public_model_id(model: str) -> str:
    """``model`` without a path or an address: ``local//srv/weights/m.gguf`` becomes ``local/m.gguf``."""
    if not PATH_OR_ADDRESS.search(model):
        return model
    provider, _, rest = model.partition("/")
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    keeps_provider = bool(rest) and re.fullmatch(r"[\w.-]+", provider) is not None
    return f"{provider}/{last}" if keeps_provider and provider != last else last


def lm_record(lm: Any) -> LMRecord:
    """What may be written about ``lm``."""
    settings = {key: value for key, value in (getattr(lm, "kwargs", None) or {}).items() if value is not None}
    sampling = {key: value for key, value in settings.items() if key in SAMPLING_KEYS and _is_plain(value)}
    left_out = tuple(sorted(set(settings) - set(sampling)))
    model = str(getattr(lm, "model", type(lm).__name__))
    rebuilt = (
        type(lm) is dspy.LM
        and isinstance(lm.engine, str)
        and public_model_id(model) == model
        and set(left_out) <= set(KEY_SETTINGS)
    )
    return LMRecord(public_model_id(model), sampling, left_out, rebuilt)


def lm_state(lm: Any) -> dict[str, Any] | None:
    """DSPy's state of ``lm`` by the allow-list, or ``None`` for an LM that loading cannot make again."""
    record = lm_record(lm)
    if not record.rebuilt:
        return None
    state = {key: value for key, value in lm.dump_state().items() if key in LM_KEYS and _is_plain(value)}
    return {**state, LM_CLASS_KEY: BUILTIN_LM_CLASS}


def predictor_state(predictor: dspy.Predict) -> dict[str, Any]:
    """DSPy's state of one predictor: instructions, descriptions and the fields of its demos.

    Traces, training data and fields of a demo that no prompt shows (an example's source, say) are left out.
    """
    bare = predictor.__class__.__new__(predictor.__class__)
    bare.__dict__.update(predictor.__dict__)
    bare.lm, bare.traces, bare.train = None, [], []
    shown = (*predictor.signature.fields, "augmented")
    bare.demos = [{name: demo[name] for name in shown if name in demo} for demo in predictor.demos]
    state: dict[str, Any] = bare.dump_state()
    state["demos"] = [{name: jsonable(value) for name, value in demo.items()} for demo in state["demos"]]
    state["lm"] = lm_state(predictor.lm) if predictor.lm is not None else None
    return state


def config_record(predictor: dspy.Predict) -> dict[str, Any] | None:
    """What may be written about a predictor's own settings, ``None`` where it has none."""
    config = {key: value for key, value in getattr(predictor, "config", {}).items() if value is not None}
    sampling = {key: value for key, value in config.items() if key in SAMPLING_KEYS and _is_plain(value)}
    if not config:
        return None
    return {"sampling": sampling, "left_out": sorted(set(config) - set(sampling))}


def program_state(program: dspy.Module) -> dict[str, Any]:
    """DSPy's state of the program, in the form that ``dspy.Module.load`` reads."""
    states = {name: predictor_state(predictor) for name, predictor in program.named_predictors()}
    # DSPy writes the state of a lone Predict without its name.
    state = states[SELF] if set(states) == {SELF} else states
    return {**state, "metadata": {"dependency_versions": get_dependency_versions()}}


def states_by_predictor(state: Mapping[str, Any], predictors: Iterable[str]) -> dict[str, Any]:
    """The states in ``program.json`` by predictor, for the predictors that the manifest names."""
    bare = {name: value for name, value in state.items() if name != "metadata"}
    return {SELF: bare} if set(predictors) == {SELF} else bare


def adapter_record(adapter: Any) -> dict[str, Any]:
    """The adapter's class and its plain options."""
    options = {name: getattr(adapter, name) for name in ADAPTER_OPTIONS if hasattr(adapter, name)}
    return {"class": type(adapter).__name__, "options": {k: v for k, v in options.items() if _is_scalar(v)}}


def numbers_only(value: Any, depth: int = 6) -> Any:
    """``value`` with nothing but numbers, booleans and ``None`` under its keys; ``None`` where nothing is left.

    Texts of a result may quote data or name paths, so none is copied.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth and isinstance(value, Mapping):
        kept = {
            str(k): numbers_only(v, depth - 1)
            for k, v in value.items()
            if PATH_OR_ADDRESS.search(str(k)) is None
        }
        return {key: item for key, item in kept.items() if item is not None} or None
    if depth and isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value):
        return list(value)
    return None


def known_secrets(lms: Iterable[Any]) -> dict[str, str]:
    """Texts that must not be in any file, and where each is from: keys, addresses, headers and account names of the LMs,
    and secrets of the environment.
    """
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        is_secret = SECRET_NAME.search(name) and not PLAIN_COUNT.match(name.lower())
        if is_secret and not ORDINARY.fullmatch(value):
            found[value] = f"the value of the environment variable {name}"
    for lm in lms:
        for name, value in (getattr(lm, "kwargs", None) or {}).items():
            found |= dict.fromkeys(_secret_texts({name: value}), f"the setting {str(name)!r} of an LM")
    return {text: source for text, source in found.items() if len(text) >= MIN_SECRET_CHARACTERS}


def check_no_secret(files: Mapping[str, bytes], secrets: Mapping[str, str]) -> None:
    """Refuse files that hold a secret.

    Args:
        files: Contents by name.
        secrets: As ``known_secrets`` gives them.

    Raises:
        ArtifactError: names the file and where the secret is from, never the secret.
    """
    for secret, source in secrets.items():
        escaped = secret.encode("unicode_escape")
        for name, content in files.items():
            if secret.encode("utf-8", "replace") in content or escaped in content:
                raise ArtifactError(
                    f"{name} would hold {source}, which is taken for a secret ({len(secret)} characters); remove it from the "
                    "instructions, the demos or the labels"
                )


def _secret_texts(value: Any, *, named: bool = False, whole: bool = False) -> set[str]:
    """Secrets in a setting of an LM.

    Args:
        value: Of the setting.
        named: Whether its name says that its text, or the texts in its list, are secret.
        whole: Whether all that it holds is secret.
    """
    if isinstance(value, str):
        return {value} if named or whole or ADDRESS.fullmatch(value) else set()
    if isinstance(value, Mapping):
        found: set[str] = set()
        for name, item in value.items():
            found |= _secret_texts(
                item,
                named=_is_secret_setting(str(name)),
                whole=whole or SECRET_MAPPING.search(str(name)) is not None,
            )
        return found
    if isinstance(value, list | tuple):
        return {text for item in value for text in _secret_texts(item, named=named, whole=whole)}
    return set()


def _is_secret_setting(name: str) -> bool:
    return SECRET_SETTING.search(name) is not None and PLAIN_COUNT.match(name.lower()) is None


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _is_plain(value: Any) -> bool:
    return _is_scalar(value) or (
        isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    )
