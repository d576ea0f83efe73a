"""The method itself, in PyTorch: choice of tokens, merging, summaries, and the reference patch."""

from skipvision_export.method.merging import lay_out, merge_tokens
from skipvision_export.method.patch import SkipVisionState, apply_skip_vision
from skipvision_export.method.selection import (
    cls_attention_scores,
    layout_order,
    select_by_cls_attention,
)
from skipvision_export.method.summary import SummaryTokens

__all__ = [
    "SkipVisionState",
    "SummaryTokens",
    "apply_skip_vision",
    "cls_attention_scores",
    "lay_out",
    "layout_order",
    "merge_tokens",
    "select_by_cls_attention",
]
