"""Bundles in the evaluation frameworks of others."""

from __future__ import annotations

from typing import Any


def lmms_manifest() -> Any:
    """For lmms-eval's entry points `lmms_eval.models`: the model `skipvision` and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="skipvision", chat_class_path=f"{__name__}.lmms.SkipVision")
