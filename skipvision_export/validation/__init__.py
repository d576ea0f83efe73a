"""Comparing arrays and generations; knows no backend."""

from skipvision_export.validation.compare import TensorGap, tensor_gap, worst
from skipvision_export.validation.gaps import LIMITS, Gap, compare_steps, layer_rows

__all__ = ["LIMITS", "Gap", "TensorGap", "compare_steps", "layer_rows", "tensor_gap", "worst"]
