"""Processors for pictures alone, where a model's own also takes videos and the machine has no torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_VIDEO = "video_processor"
# SmolVLM's own cannot be made without videos; for pictures Idefics3's writes the same prompts.
_SAME = {"SmolVLMProcessor": "Idefics3Processor"}


def pictures_only(folder: Path) -> Any:
    """The processor class of a model or bundle folder without its video processor; None to load it as it is.

    transformers' video processors need torchvision, its image processors do not.
    """
    import transformers
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return None
    name = _class_name(folder)
    found = getattr(transformers, _SAME.get(name, name), None)
    if found is None or (_VIDEO not in found.get_attributes() and name not in _SAME):
        return None
    return without_videos(found)


def without_videos(processor: Any) -> Any:
    """A processor class that has no video processor, under the same name, which is saved with it."""

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in processor.get_attributes() if name != _VIDEO]

    return type(processor.__name__, (processor,), {"get_attributes": classmethod(get_attributes)})


def _class_name(folder: Path) -> str:
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            values = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and values.get("processor_class"):
            return str(values["processor_class"])
    return ""
