"""Names of graphs and tensors, those of onnxruntime-genai and transformers.js."""

from __future__ import annotations

VISION = "vision_encoder"
EMBED = "embed_tokens"
PREFILL = "decoder_prefill"
DECODE = "decoder_decode"
# Prefill that goes on from a cache: of a further turn of a conversation, with pictures or without.
APPEND = f"{PREFILL}.append"

FFN_INDEX = "ffn_index"
KV_KEEP_INDEX = "kv_keep_index"
# What a decoder takes its tokens as, ours the first of them.
TOKEN_INPUTS = ("inputs_embeds", "input_ids")
POSITION_IDS = "position_ids"
# Only in bundles with strict masking.
IMAGE_INDEX = "image_index"

# What the vision encoder gives and embeddings take.
IMAGE_FEATURES = "image_features"
# Of a picture of any shape, what its encoder takes: its grid of patches, [1, 3] of time, rows and columns,
# and, where tokens are chosen, how many are retained and skipped, [2], and [1, V] scores where those do not
# depend on the picture. And what it gives where they are chosen: the place in raster order of each
# laid-out token, [1, total], -1 for a summary token.
GRID = "image_grid_thw"
# Beside it where the tower attends within windows: the patches of each, see PatchInput.
WINDOWS = "window_index"
GROUP_SIZES = "group_sizes"
TOKEN_SCORES = "token_scores"
PLACES = "image_places"
# Further features of the visual tokens, [B, S, levels * D], zero at text: from embeddings to prefill, which
# adds them behind its first layers.
DEEPSTACK = "deepstack_embeds"
# Inside the vision encoder, where tokens are laid out: the features before that.
RASTER_FEATURES = "image_features.raster"
# And there the chosen order of the tokens, [N, V] int64, where it depends on the picture.
TOKEN_ORDER = "image_features.order"

# Runtimes that some graphs have a form of their own for: `GRAPH.RUNTIME`.
ONNXRUNTIME, GENAI, TRANSFORMERS_JS = "onnxruntime", "genai", "transformers.js"

# The project's operator domain and its version.
DOMAIN = "skipvision"
DOMAIN_VERSION = 1
# That of ONNX Runtime's own operators.
CONTRIB_DOMAIN = "com.microsoft"


def ffn_index_name(tier: int) -> str:
    """Input with the rows that go through the FFN of layers of `tier`; only policies have several."""
    return FFN_INDEX if tier == 1 else f"{FFN_INDEX}.{tier}"


def ffn_dim_name(tier: int) -> str:
    """Name of that input's only dimension."""
    return "ffn_tokens" if tier == 1 else f"ffn_tokens_{tier}"


def present_names(prefix: str, layers: int) -> list[str]:
    """`prefix.0.key`, `prefix.0.value`, `prefix.1.key`, ..."""
    return [f"{prefix}.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def past_name(present: str) -> str:
    """The input of decode that an output such as `present.0.key` is fed to."""
    return f"past_key_values.{present.removeprefix('present.')}"
