"""Model families, registered by importing their file here."""

from skipvision_export.models import llava as llava
from skipvision_export.models import llava_next as llava_next
from skipvision_export.models.registry import (
    DecoderDims,
    ModelFamily,
    VisionDims,
    check_parts,
    family_of,
    supported_architectures,
)

__all__ = ["DecoderDims", "ModelFamily", "VisionDims", "check_parts", "family_of", "supported_architectures"]
