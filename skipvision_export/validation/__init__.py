"""Comparing arrays and generations; knows no backend."""

from skipvision_export.validation.compare import TensorGap, tensor_gap, worst
from skipvision_export.validation.gaps import LIMIT, Choice, Gap, compare_steps, layer_rows
from skipvision_export.validation.precision import (
    INT4_MIN_DB,
    MIN_CHOICE,
    MIN_DB,
    Groups,
    compare_precision,
    same_choice,
)

__all__ = [
    "INT4_MIN_DB",
    "LIMIT",
    "MIN_CHOICE",
    "MIN_DB",
    "Choice",
    "Gap",
    "Groups",
    "TensorGap",
    "compare_precision",
    "compare_steps",
    "layer_rows",
    "same_choice",
    "tensor_gap",
    "worst",
]
