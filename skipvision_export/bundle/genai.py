"""onnxruntime-genai: which bundles it can run, and the `genai_config.json` that it wants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from skipvision_export.errors import ConfigError
from skipvision_export.graph.passes.names import DECODE, EMBED, GENAI, IMAGE_FEATURES, TOKEN_INPUTS, VISION
from skipvision_export.layout import TokenLayout
from skipvision_export.models import ModelFamily
from skipvision_export.models.loading import ModelSource

GENAI_CONFIG = "genai_config.json"
# genai knows a pipeline by the family that it was written for. Of those with a vision encoder this one asks
# nothing of the graphs but their names: no grids, no sizes, no positions in three axes.
_PIPELINE = "gemma3"


def check_genai(layout: TokenLayout, family: ModelFamily, dtype: str) -> None:
    """Raise ConfigError for a bundle that onnxruntime-genai cannot run, with why."""
    if layout.total != layout.retained or layout.summaries:
        raise ConfigError(
            "onnxruntime-genai runs dense exports only: it gives its one decoder graph no ffn_index and no "
            "kv_keep_index, and its positions count the cached tokens, which are fewer once K/V are pruned; "
            "use --dense, or leave out --target"
        )
    if family.dynamic:
        raise ConfigError(
            "onnxruntime-genai counts positions on one axis in the pipeline that runs our graphs; in "
            f"{family.name} they have three, and pictures any shape: leave out --target"
        )
    if family.tiled:
        raise ConfigError(
            "onnxruntime-genai gives the embeddings the tiles of a picture as they come, unpacked; a tiled "
            "model cannot run there: leave out --target"
        )
    if family.sees != "before":
        raise ConfigError(
            "onnxruntime-genai runs one decoder graph for prompt and answer, in which tokens see those "
            f"before them; in {family.name} prompts see their whole {family.sees}: leave out --target"
        )
    if dtype == "bfloat16":
        raise ConfigError("onnxruntime-genai has no CPU kernels for bfloat16; use float32 or float16")


def write_genai(folder: Path, source: ModelSource, end: Sequence[int]) -> None:
    """Write `genai_config.json` into a dense bundle whose graphs have their forms for genai.

    end: ids of end tokens. The decoder is the decode graph: of no past and many tokens it is prefill.

    Hugging Face's processor makes the inputs, as genai's own ones know other families' tokens only:
    `Generator.set_inputs` of a NamedTensors with `input_ids` [1, S] int32, a placeholder for each visual
    token, and, where there are pictures, `pixel_values` [N, 3, h, w] and `num_image_tokens` [1] int64.
    """
    dims, text = source.family.decoder_dims(source.config), source.config.text_config
    context = text.max_position_embeddings
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"onnx/{DECODE}.onnx",
        "head_size": dims.head_dim,
        "hidden_size": dims.hidden_size,
        "num_attention_heads": dims.num_heads,
        "num_hidden_layers": dims.num_layers,
        "num_key_value_heads": dims.num_kv_heads,
        "inputs": {name: name for name in (TOKEN_INPUTS[0], "attention_mask", "position_ids")}
        | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }

    def first(given: int | None, otherwise: int) -> int:
        return otherwise if given is None else given

    features = {IMAGE_FEATURES: IMAGE_FEATURES}
    config = {
        "model": {
            "type": _PIPELINE,
            "context_length": context,
            "vocab_size": dims.vocab_size,
            "bos_token_id": first(text.bos_token_id, end[0]),
            "eos_token_id": list(end),
            "pad_token_id": first(text.pad_token_id, end[0]),
            "image_token_id": source.family.image_token_id(source.config),
            "decoder": decoder,
            "embedding": {
                "filename": f"onnx/{EMBED}.{GENAI}.onnx",
                "inputs": {"input_ids": "input_ids"} | features,
                "outputs": {"inputs_embeds": "inputs_embeds"},
            },
            "vision": {
                "filename": f"onnx/{VISION}.{GENAI}.onnx",
                "inputs": {"pixel_values": "pixel_values"},
                "outputs": features,
            },
        },
        # The decode graph makes new K and V in each step.
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False},
    }
    (folder / GENAI_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
