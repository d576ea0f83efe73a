"""Model families, registered by importing their file here."""

from skipvision_export.models import gemma3 as gemma3
from skipvision_export.models import idefics3 as idefics3
from skipvision_export.models import internvl as internvl
from skipvision_export.models import llava as llava
from skipvision_export.models import llava_next as llava_next
from skipvision_export.models import llava_onevision as llava_onevision
from skipvision_export.models import paligemma as paligemma
from skipvision_export.models import qwen2_5_vl as qwen2_5_vl
from skipvision_export.models import qwen2_vl as qwen2_vl
from skipvision_export.models import qwen3_vl as qwen3_vl
from skipvision_export.models.registry import (
    DecoderDims,
    ModelFamily,
    PatchInput,
    Sees,
    VisionDims,
    check_parts,
    family_of,
    supported_architectures,
)

__all__ = [
    "DecoderDims",
    "ModelFamily",
    "PatchInput",
    "Sees",
    "VisionDims",
    "check_parts",
    "family_of",
    "supported_architectures",
]
