"""`local_lm`: a `dspy.LM` over a local engine."""

from __future__ import annotations

import functools
import inspect
import json
import weakref
from pathlib import Path
from threading import Lock
from typing import Any

import dspy

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.local.admission import DEFAULT_RUNNING_TOKENS
from asyndbt_dspy.lms.local.engine import AsyncLocalEngine, LocalCore, LocalEngine
from asyndbt_dspy.lms.local.models import choose_device, choose_dtype, load_model
from asyndbt_dspy.lms.local.weights import find_model

DEFAULT_BATCH_TOKENS = 2048
DEFAULT_PREFIX_CACHE_TOKENS = 16384


def engines_for(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    deterministic: bool = False,
    max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
    prefix_cache_tokens: int = DEFAULT_PREFIX_CACHE_TOKENS,
    max_running_tokens: int = DEFAULT_RUNNING_TOKENS,
) -> tuple[LocalEngine, AsyncLocalEngine]:
    """A new engine pair for these settings; `shared_engines` finds it for as long as it is alive."""
    _check_bounds(max_batch_tokens, prefix_cache_tokens, max_running_tokens)
    model = str(model)
    settings: dict[str, Any] = {
        "model": model,
        "device": device,
        "dtype": dtype,
        "deterministic": deterministic,
        "max_batch_tokens": max_batch_tokens,
        "prefix_cache_tokens": prefix_cache_tokens,
        "max_running_tokens": max_running_tokens,
    }
    source = find_model(model)
    chosen = choose_device(device)
    loaded = load_model(source, chosen, choose_dtype(dtype, chosen, deterministic=deterministic))
    core = LocalCore(
        loaded,
        name=source.name,
        plain_template=source.plain_template,
        deterministic=deterministic,
        max_batch_tokens=max_batch_tokens,
        prefix_cache_tokens=prefix_cache_tokens,
        max_running_tokens=max_running_tokens,
    )
    with _registering:
        _alive.setdefault(_key(settings), weakref.WeakSet()).add(core)
    return LocalEngine(core, settings), AsyncLocalEngine(core, settings)


_alive: dict[str, weakref.WeakSet[LocalCore]] = {}
_registering = Lock()
_loading = Lock()


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


@functools.cache
def _defaults() -> dict[str, Any]:
    parameters = inspect.signature(engines_for).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def shared_engines(state: dict[str, Any]) -> tuple[LocalEngine, AsyncLocalEngine]:
    """Engines for a saved state.

    DSPy loads the sync and the async engine of an LM, and the LM of every predictor, one by one: those of equal
    state share one model with each other, and with the LM that was saved, for as long as any of them is alive.
    """
    with _loading:
        with _registering:
            key = _key(_defaults() | state)  # an earlier version may not have saved what has a default now
            core = next((core for core in _alive.get(key, ()) if not core.closed), None)
        if core is None:
            return engines_for(**state)
        return LocalEngine(core, state), AsyncLocalEngine(core, state)


def local_lm(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    deterministic: bool = False,
    max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
    prefix_cache_tokens: int = DEFAULT_PREFIX_CACHE_TOKENS,
    max_running_tokens: int = DEFAULT_RUNNING_TOKENS,
    cache: bool = False,
    **lm_options: Any,
) -> dspy.LM:
    """A local model as a `dspy.LM`.

    Every call makes a new engine with weights of its own. Copies of the LM share them, and so do equal LMs that come
    with a loaded or an unpickled program while it is alive; `lm.engine.close()` ends it for all of them.

    Args:
        model: `"smollm2-135m"` or `"gemma3-270m"` (weights from an installed package), a folder, a GGUF file or a
            Hugging Face id.
        device: `"auto"`, `"cpu"` or `"cuda:N"`; one engine runs on one device.
        dtype: `"auto"` (bfloat16 where the hardware computes it, else float32), `"float32"` or `"bfloat16"`.
        deterministic: Compute in float32 and use a fixed seed where a request has none: a request's answer does
            not depend on what else is in the batch. Equal requests are then answered equally at any temperature, so
            the samples of `n=3`, and rollouts by `rollout_id`, are alike; a `seed` for each makes them differ.
        max_batch_tokens: Bound on the tokens of one pass through the model, >= 16.
        prefix_cache_tokens: Bound on remembered prompt prefixes in tokens; 0 shares nothing.
        max_running_tokens: Bound on what running requests hold beside that: so many tokens for the texts that they
            generate (each its last turn and `max_tokens`, all as long as the longest), and as many for the prompts
            they use. Further requests wait; one always runs. Requests that one pass answers do not count.
        cache: DSPy's response cache. Off by default: it costs more than it saves on a small local model, and an
            answer from it reports no distribution.
        lm_options: Further arguments of `dspy.LM` (temperature, max_tokens, ...).

    Raises:
        ConfigurationError: A model, device, dtype or bound that cannot work.
    """
    engine, async_engine = engines_for(
        model,
        device=device,
        dtype=dtype,
        deterministic=deterministic,
        max_batch_tokens=max_batch_tokens,
        prefix_cache_tokens=prefix_cache_tokens,
        max_running_tokens=max_running_tokens,
    )
    return dspy.LM(f"local/{model}", engine=engine, async_engine=async_engine, cache=cache, **lm_options)


def _check_bounds(max_batch_tokens: int, prefix_cache_tokens: int, max_running_tokens: int) -> None:
    if max_batch_tokens < 16:
        raise ConfigurationError(f"max_batch_tokens is {max_batch_tokens}, it must be at least 16")
    if prefix_cache_tokens < 0:
        raise ConfigurationError(f"prefix_cache_tokens is {prefix_cache_tokens}, it must be at least 0")
    if max_running_tokens < 1:
        raise ConfigurationError(f"max_running_tokens is {max_running_tokens}, it must be at least 1")
