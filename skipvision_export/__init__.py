"""Export Hugging Face vision-language models with Skip-Vision: text-only FFN paths, pruned KV cache.

Names load on first use, so that importing the package stays light and touches no accelerator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipvision_export.config import SkipVisionConfig as SkipVisionConfig
    from skipvision_export.exporter import export as export
    from skipvision_export.method import apply_skip_vision as apply_skip_vision
    from skipvision_export.rewriting import rewrite_decoder as rewrite_decoder
    from skipvision_export.runtime.pipeline import Bundle as Bundle

__version__ = "0.1.0"

_WHERE = {
    "SkipVisionConfig": "skipvision_export.config",
    "apply_skip_vision": "skipvision_export.method",
    "export": "skipvision_export.exporter",
    "rewrite_decoder": "skipvision_export.rewriting",
    "Bundle": "skipvision_export.runtime.pipeline",
}
__all__ = ["Bundle", "SkipVisionConfig", "apply_skip_vision", "export", "rewrite_decoder"]


def __getattr__(name: str) -> Any:
    """Import a public name from where it stands."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    """Public names, for tab completion."""
    return sorted([*globals(), *__all__])
