"""The chat template as two pieces of text, for runtimes that have no Jinja."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skipvision_export.bundle import PromptInfo
from skipvision_export.errors import InputError, ModelError
from skipvision_export.models.loading import load_processor
from skipvision_export.runtime.prompt import prompt_text

_MARK = "skipvision-question"
# Questions that a template might treat apart: spaces, lines or markup around.
_PROBES = (_MARK, f"  {_MARK} ", f"\n{_MARK}\n", f'"{_MARK}" <b> {{{{ x }}}}')


def read_chat(folder: Path) -> PromptInfo | None:
    """`chat_info` of a model or bundle folder; None where it holds no processor."""
    try:
        return chat_info(load_processor(folder))
    except ModelError:
        return None


def chat_info(processor: Any) -> PromptInfo | None:
    """What `prompt_text` puts around a question about one picture.

    None where there is no chat template, where it refuses such a question, or where it does more than
    put text around the question or the stripped question.
    """
    if not getattr(processor, "chat_template", None):
        return None
    from jinja2 import TemplateError

    try:
        rendered = [prompt_text(processor, probe) for probe in _PROBES]
    except (InputError, TemplateError):
        return None
    before, _, after = rendered[0].partition(_MARK)
    for strips in (False, True):
        questions = [probe.strip() if strips else probe for probe in _PROBES]
        if rendered == [before + question + after for question in questions]:
            return PromptInfo(before=before, after=after, strips=strips)
    return None
