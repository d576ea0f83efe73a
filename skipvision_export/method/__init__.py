"""The method itself, in PyTorch: choice of tokens, merging, summaries, and the reference patch."""

from skipvision_export.method.merging import lay_out, merge_tokens
from skipvision_export.method.patch import apply_skip_vision, attach_summary
from skipvision_export.method.saved import save_skip_vision, saved_config, saved_summary
from skipvision_export.method.selection import (
    cls_attention_scores,
    layout_order,
    select_by_cls_attention,
)
from skipvision_export.method.state import SkipVisionState
from skipvision_export.method.summary import SummaryTokens

__all__ = [
    "SkipVisionState",
    "SummaryTokens",
    "apply_skip_vision",
    "attach_summary",
    "cls_attention_scores",
    "lay_out",
    "layout_order",
    "merge_tokens",
    "save_skip_vision",
    "saved_config",
    "saved_summary",
    "select_by_cls_attention",
]
