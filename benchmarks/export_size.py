"""Model size against time and peak memory of `skipvision export`, each in a process of its own.

Random weights of real shapes, written shard by shard into a temporary folder and removed. Run from the
repository's root on an idle machine, about fifteen minutes on two cores; needs 40 GB of disk, or pick
smaller models:

python benchmarks/export_size.py --json benchmarks/results/export_size.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from skipvision_export.benchmark.timing import machine
from skipvision_export.bundle import Manifest
from skipvision_export.models.checkpoint import INDEX

SHARD_BYTES = 2 << 30
# Rows of this ending leave the weights in the model's files.
REFERENCED = " --reference-weights"
CLIP_L = (1024, 4096, 24, 16, 336, 14)
SMALL_TOWER = (256, 1024, 4, 4, 112, 14)
# hidden, layers, FFN, heads, key/value heads, vocabulary; tower; weights' and bundle's type
MODELS: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
    "tiny": ((128, 4, 256, 4, 2, 512), SMALL_TOWER, "bfloat16"),
    "0.5B": ((896, 24, 4864, 14, 2, 151936), CLIP_L, "bfloat16"),
    "1B": ((2048, 16, 8192, 32, 8, 128256), CLIP_L, "bfloat16"),
    "3B": ((3072, 28, 8192, 24, 8, 128256), CLIP_L, "bfloat16"),
    "8B": ((4096, 32, 14336, 32, 8, 128256), CLIP_L, "bfloat16"),
    f"8B{REFERENCED}": ((4096, 32, 14336, 32, 8, 128256), CLIP_L, "bfloat16"),
    # The random Llama of the speed benchmarks, with a small tower.
    "llama-1024x16": ((1024, 16, 2816, 16, 8, 32000), SMALL_TOWER, "float32"),
}
CHILD = (
    "import sys, json; from skipvision_export.cli import run; "
    "from skipvision_export.benchmark.memory import own_peak_mb; "
    "code = run(sys.argv[1:]); print(json.dumps(own_peak_mb())); sys.exit(code)"
)


def main() -> None:
    """Write the JSON; models that are not asked for keep their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    if arguments.json and arguments.json.is_file():
        rows = json.loads(arguments.json.read_text())["models"]
    for name in arguments.models:
        with TemporaryDirectory() as scratch:
            rows[name] = measure(name, Path(scratch))
        print(name, rows[name], flush=True)
        if arguments.json:
            ordered = {key: rows[key] for key in MODELS if key in rows}
            result = {"machine": machine(), "models": ordered}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(name: str, scratch: Path) -> dict[str, Any]:
    """Seconds and peak MiB of the whole command, start of Python included."""
    decoder, tower, dtype = MODELS[name]
    weights = write_model(scratch / "model", decoder, tower, getattr(torch, dtype))
    os.sync()  # what is still to be written of the checkpoint is not the export's work
    command = ["export", scratch / "model", "-o", scratch / "bundle", "--preset", "skip-75", "--dtype", dtype]
    if name.endswith(REFERENCED):
        command.append(REFERENCED.strip())
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, command)], check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    manifest = Manifest.load(scratch / "bundle")
    manifest.verify(scratch / "bundle")
    return {
        "dtype": dtype,
        "weights_bytes": weights,
        "bundle_bytes": manifest.own_bytes,
        "seconds": round(seconds, 1),
        "peak_rss_mb": round(json.loads(done.stdout.splitlines()[-1])),
        "verify_seconds": round(time.perf_counter() - start, 1),
    }


def write_model(folder: Path, decoder: tuple[int, ...], tower: tuple[int, ...], dtype: torch.dtype) -> int:
    """A random LLaVA in shards of SHARD_BYTES; returns the bytes of its weights."""
    folder.mkdir()
    model_config = config(decoder, tower)
    model_config.dtype = dtype
    model_config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(model_config)
    # A stretch of one block of random numbers for each tensor: making billions would take minutes.
    generator = torch.Generator().manual_seed(0)
    block = (0.02 * torch.randn(1 << 26, generator=generator)).to(dtype)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    total = 0

    def flush() -> None:
        file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, parameter in model.state_dict().items():
        size = parameter.numel()
        start = int(torch.randint(len(block) // 2, (1,), generator=generator))
        repeats = -(-size // (len(block) // 2))
        stretch = block[start : start + len(block) // 2].repeat(repeats)[:size]
        shard[name] = stretch.view(parameter.shape).clone()
        total += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    return total


def config(decoder: tuple[int, ...], tower: tuple[int, ...]) -> LlavaConfig:
    """A LLaVA of these sizes."""
    hidden, layers, ffn, heads, kv_heads, vocabulary = decoder
    width, wide, depth, vision_heads, image, patch = tower
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=wide,
            num_hidden_layers=depth,
            num_attention_heads=vision_heads,
            image_size=image,
            patch_size=patch,
        ),
        text_config=LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=ffn,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
        ),
        image_token_id=vocabulary - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        architectures=["LlavaForConditionalGeneration"],
    )


if __name__ == "__main__":
    main()
