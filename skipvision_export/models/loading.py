"""Loading a Hugging Face folder or Hub id, with the checks that a user's mistake needs."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipvision_export.errors import ModelError
from skipvision_export.models.checkpoint import Checkpoint
from skipvision_export.models.registry import ModelFamily, check_parts, family_of

# How NVIDIA ModelOpt and others name the scales beside a quantized weight.
_QUANTIZED = re.compile(
    r"_quantizer\.|\.(weight|input|output|k|v)_scale(_inv|_2)?$|\.(qweight|qzeros|absmax)$"
)
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "*token*",
    "vocab*",
    "merges.txt",
    "*processor*",
    "chat_template*",
)


@dataclass(frozen=True)
class ModelSource:
    """A model folder on this machine, its parsed configuration and its family.

    `name` is what the user typed, without any folder of this machine in front of it.
    """

    folder: Path
    name: str
    config: Any
    family: ModelFamily

    @property
    def architecture(self) -> str:
        """The transformers class that config.json names."""
        return next(name for name in self.config.architectures if name in self.family.architectures)


def resolve_model(model: str | Path, revision: str | None = None) -> ModelSource:
    """Find MODEL (a folder or a Hub id) and read its configuration; no weights are loaded.

    Raises ModelError for a folder that is no model and for an unsupported architecture.
    """
    folder = Path(model)
    if not folder.is_dir():
        # A Hub id is NAME or OWNER/NAME: anything else was meant as a folder.
        if folder.is_absolute() or len(folder.parts) > 2 or str(model).startswith("."):
            raise ModelError(f"{model} does not exist; expected a folder with a Hugging Face model")
        folder = _download(str(model), revision)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{model} is no model: it has no config.json")
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{config_file} is no readable JSON: {error}") from None
    named = raw.get("architectures") if isinstance(raw, dict) else None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        named = None
    family = family_of(named, str(config_file))

    from transformers import AutoConfig

    try:
        # Said outright: left open, transformers asks on the terminal whether to run a model's own code.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises many kinds on a broken configuration
        raise ModelError(f"{config_file} cannot be used: {_first_line(error)}") from None
    try:
        family.check(config)
        # What everything else relies on: sizes that can be computed with.
        family.decoder_dims(config)
        family.visual_tokens(config)
        family.image_token_id(config)
    except (AttributeError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ModelError(
            f"{config_file} cannot be used: its values do not fit a model of family {family.name!r} "
            f"({_first_line(error)})"
        ) from None
    return ModelSource(folder, folder.resolve().name if folder == Path(model) else str(model), config, family)


def load_model(source: ModelSource, dtype: str = "float32") -> Any:
    """The model in evaluation mode on the CPU, weights checked to be finite.

    Raises ModelError for missing, truncated, quantized or non-finite weights.
    """
    import torch

    from skipvision_export.models.weights import not_finite

    check_full(source)
    model = load_state(source, dtype)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise not_finite(name, source.folder, dtype)
    return model


def load_state(source: ModelSource, dtype: str, state: dict[str, Any] | None = None) -> Any:
    """The model in evaluation mode on the CPU, from its folder or from tensors by checkpoint key.

    Raises ModelError for missing, truncated or misshapen weights.
    """
    import torch
    import transformers

    # Not through an Auto class: those want a folder even where they are given the weights.
    loader: Any = getattr(transformers, source.architecture)
    folder = source.folder if state is None else None
    try:
        with quiet():
            model, info = loader.from_pretrained(
                folder,
                config=source.config,
                state_dict=state,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
            )
    except Exception as error:  # safetensors and transformers raise many kinds on a broken file
        raise ModelError(f"the weights in {source.folder} cannot be loaded: {_first_line(error)}") from None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = sorted(key for key in info["missing_keys"] if key not in tied)
    if missing:
        raise ModelError(
            f"the weights in {source.folder} lack {len(missing)} tensors, the first is {missing[0]}"
        )
    check_parts(source.family, model)
    return model.eval()


def check_full(source: ModelSource) -> Checkpoint:
    """The checkpoint's headers.

    Raises ModelError for one that is quantized already, whose scales loading would drop, and as
    `Checkpoint.open` does.
    """
    checkpoint = Checkpoint.open(source.folder)
    method = getattr(source.config, "quantization_config", None)
    if method is not None:
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else type(method).__name__
        found = f"config.json has a quantization_config ({name})"
    else:
        name = next((key for key in checkpoint.tensors if _QUANTIZED.search(key)), None)
        found = f"its weights hold {name}"
    if name is not None:
        raise ModelError(
            f"{source.folder} is quantized already: {found}; give the model as it was before, and quantize "
            "its export (export --weights int4)"
        )
    return checkpoint


def load_processor(folder: Path) -> Any:
    """Image processor and tokenizer of a model or bundle folder; raises ModelError."""
    from transformers import AutoProcessor

    from skipvision_export.models.pictures import pictures_only

    try:
        return (pictures_only(folder) or AutoProcessor).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds on a broken processor
        raise ModelError(f"the processor in {folder} cannot be loaded: {_first_line(error)}") from None


def copy_companions(source: Path, folder: Path) -> None:
    """Copy a model folder's files beside its weights: what turns pictures and prompts into tensors."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers while it loads, saves or trains."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision))
    except Exception as error:  # network, name and permission errors all mean the same here
        raise ModelError(
            f"{model} is neither a folder nor a model that the Hugging Face Hub gives ({_first_line(error)})"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
