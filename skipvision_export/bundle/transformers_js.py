"""transformers.js: which bundles it can run, and the files and names that it wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skipvision_export.errors import ConfigError
from skipvision_export.graph.passes.names import DECODE, EMBED, TRANSFORMERS_JS, VISION
from skipvision_export.layout import TokenLayout
from skipvision_export.models.loading import ModelSource, load_processor

_DECODER = "decoder_model_merged"
# The only one of our families whose vision encoder takes what its processor there gives, [N, 3, h, w].
_FAMILY = "llava"
_CONFIG = "transformers.js_config"


def check_transformers_js(
    layout: TokenLayout, source: ModelSource, dtype: str, reference_weights: bool
) -> None:
    """Raise ConfigError for a bundle that transformers.js cannot run, with why."""
    if layout.total != source.family.visual_tokens(source.config) or layout.retained != layout.total:
        raise ConfigError(
            "transformers.js runs dense exports only: it puts a placeholder for each patch, gives its one "
            "decoder graph no ffn_index and no kv_keep_index, and counts positions by what is cached, which "
            "is less once K/V are pruned; use --dense, or leave out --target"
        )
    if source.family.name != _FAMILY:
        raise ConfigError(
            f"transformers.js takes pictures of family {source.family.name!r} in another form than these "
            f"graphs do; supported with this target: {_FAMILY!r}; leave out --target"
        )
    if dtype != "float32":
        raise ConfigError(
            f"transformers.js hands pictures and features over in float32, not {dtype}; use --dtype float32, "
            "and --weights int4 for a small decoder"
        )
    if reference_weights:
        raise ConfigError(
            "transformers.js finds weights by a name of its own (decoder_model_merged.onnx_data), not in the "
            "model's files; leave out --reference-weights"
        )


def transformers_js_stems(weights: str | None) -> dict[str, str]:
    """Graph or form -> the name of its file without `.onnx`, where it is not the graph's own.

    Embeddings that also take features, as our runtimes use them, make room for those of ids alone.
    """
    return {
        EMBED: f"{EMBED}.merging",
        f"{EMBED}.{TRANSFORMERS_JS}": EMBED,
        f"{DECODE}.{TRANSFORMERS_JS}": decoder_stem(weights),
    }


def decoder_stem(weights: str | None) -> str:
    """Of the decoder's graph, and of the file with its weights: the suffix tells their type."""
    return f"{_DECODER}_q4" if weights else _DECODER


def write_transformers_js(folder: Path, weights: str | None) -> None:
    """Let the configuration files of a written bundle say what transformers.js has to know.

    config.json gets the types and data files of the graphs. The processor's files get one placeholder for
    each feature: transformers.js adds `num_additional_image_tokens` to the patches, and knows nothing of
    the CLS row that Python takes off again. Python counts the same either way.
    """
    stems = {VISION: VISION, EMBED: EMBED, _DECODER: decoder_stem(weights)}
    data = {name: 1 for name, stem in stems.items() if (folder / "onnx" / f"{stem}.onnx_data").is_file()}
    config = _read(folder / "config.json")
    config[_CONFIG] = {
        "dtype": dict.fromkeys((VISION, EMBED), "fp32") | {_DECODER: "q4" if weights else "fp32"},
        "use_external_data_format": data,
    }
    _write(folder / "config.json", config)
    processor = load_processor(folder)
    # Newer checkpoints keep a picture's settings inside the processor's; transformers.js wants them apart.
    images = json.loads(processor.image_processor.to_json_string())
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    images["processor_class"] = "LlavaProcessor"
    _write(folder / "preprocessor_config.json", images)
    file = folder / "processor_config.json"
    _write(
        file,
        (_read(file) if file.is_file() else {})
        | {
            "processor_class": "LlavaProcessor",
            "image_token": processor.image_token,
            "patch_size": processor.patch_size,
            "num_additional_image_tokens": 0,
            "vision_feature_select_strategy": "full",
        },
    )


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
