"""The method itself, in PyTorch: choice of tokens and the reference patch."""

from skipvision_export.method.patch import SkipVisionState, apply_skip_vision
from skipvision_export.method.selection import (
    cls_attention_scores,
    layout_order,
    select_by_cls_attention,
)

__all__ = [
    "SkipVisionState",
    "apply_skip_vision",
    "cls_attention_scores",
    "layout_order",
    "select_by_cls_attention",
]
