"""Selectors and merges: which visual tokens are retained, and how the others become fewer.

Each stands in one small file with its two formulations: PyTorch for training and the reference,
ONNX for the exported vision encoder. They are written separately on purpose (validation compares
them), and torch is imported where it is used, so that graph passes stay free of it.
"""

from skipvision_export.tokens import bipartite, cls_attention, dart, random_choice, thumbnail, uniform
from skipvision_export.tokens.registry import (
    GraphImage,
    Merge,
    Selector,
    TorchImage,
    merge,
    merge_names,
    register_merge,
    register_selector,
    selector,
    selector_names,
)

for _cls in (
    cls_attention.ClsAttention,
    random_choice.RandomChoice,
    uniform.UniformGrid,
    dart.Dart,
    thumbnail.Thumbnail,
):
    register_selector(_cls())
for _merge in (bipartite.Bipartite,):
    register_merge(_merge())

__all__ = [
    "GraphImage",
    "Merge",
    "Selector",
    "TorchImage",
    "merge",
    "merge_names",
    "register_merge",
    "register_selector",
    "selector",
    "selector_names",
]
