"""What makes two LMs the same for a recorded answer: model, endpoint, engine and sampling. Never a key.

An LM that a run has metered, or put behind others, is what it wraps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from asyndbt_dspy.lms.endpoints import endpoint_address

_ENDPOINT_SETTINGS = ("api_base", "base_url")
_NOT_IDENTITY = frozenset(
    {
        "api_key",
        "azure_ad_token_provider",
        "extra_headers",
        "extra_query",
        "headers",
        "num_retries",
        "organization",
        "project",
        "rollout_id",
        "timeout",
    }
)
"""Keys, or what says how a request travels and not what is answered."""
_SECRET_WORDS = ("key", "token", "secret", "password", "credential", "authorization")
_PLAIN_TOKENS = ("max_tokens", "max_completion_tokens")


def lm_identity(lm: Any) -> Any:
    """Strict JSON data that differs where answers may differ."""
    members = wrapped_lms(lm)
    if members:
        return [lm_identity(one) for one in members] if len(members) > 1 else lm_identity(members[0])
    if lm is None:
        return None
    elsewhere = getattr(lm, "remote_identity", None)
    if elsewhere is not None:
        return elsewhere
    settings = getattr(lm, "kwargs", None) or {}
    address = endpoint_address(lm)
    sampling = {name: _plain(value) for name, value in sorted(settings.items()) if _is_identity(name, value)}
    return {
        "model": str(getattr(lm, "model", "")),
        "type": str(getattr(lm, "model_type", "")),
        "endpoint": None if address is None else _address(address),
        "engine": _engine_identity(lm),
        "sampling": sampling,
    }


def is_deterministic(lm: Any, overrides: Mapping[str, Any] | None = None) -> bool:
    """Whether a request is answered alike every time, so that an answer may stand for another.

    True at temperature 0, and for engines of our own that are greedy or seeded where nothing else is asked.

    Args:
        overrides: A predictor's own settings, which go before those of the LM.
    """
    members = wrapped_lms(lm)
    if members:
        return all(is_deterministic(one, overrides) for one in members)
    if getattr(lm, "remote_identity", None) is not None:
        return bool(lm.is_deterministic)
    settings = {**(getattr(lm, "kwargs", None) or {}), **(overrides or {})}
    if (settings.get("n") or 1) != 1 and settings.get("temperature"):
        return False
    engine = getattr(lm, "engine", None)
    own = engine is not None and not isinstance(engine, str)
    if own and not getattr(engine, "greedy_by_default", False):
        return False  # nobody knows what a foreign engine does, or whether two of its kind are alike
    temperature = settings.get("temperature")
    if temperature is None:
        return own
    return float(temperature) == 0.0 or (own and settings.get("seed") is not None)


def wrapped_lms(lm: Any) -> list[Any]:
    """The LMs behind an LM of this package that only limits, counts or chooses; empty for any other."""
    engine = getattr(lm, "engine", None)
    meter = getattr(engine, "meter", None)
    if meter is not None:
        return [meter.attempts.lm]
    team = getattr(engine, "team", None)
    return [member.lm for member in team.members] if team is not None else []


def _is_identity(name: str, value: Any) -> bool:
    if value is None or name in _NOT_IDENTITY or name in _ENDPOINT_SETTINGS:
        return False
    return name in _PLAIN_TOKENS or not any(word in name.lower() for word in _SECRET_WORDS)


def _engine_identity(lm: Any) -> Any:
    engine = getattr(lm, "engine", None)
    if engine is None:
        return type(lm).__qualname__
    if isinstance(engine, str):
        return engine
    dump = getattr(engine, "dump_state", None)
    state = dump() if callable(dump) else {}
    return [type(engine).__qualname__, {name: _plain(value) for name, value in sorted(state.items())}]


def _address(value: str) -> str:
    """Scheme, host, port and path: whoever may log in, and query strings that may hold keys, are left out."""
    parts = urlsplit(value)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, sort_keys=True, allow_nan=False))
    except (TypeError, ValueError):
        return type(value).__qualname__
