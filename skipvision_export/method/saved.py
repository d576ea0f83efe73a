"""What a fine-tuned checkpoint carries beside the model's own files.

`skip_vision_config.json` is the configuration it was trained with, by which `export` and `evaluate`
find the preset by themselves; `skip_vision.safetensors` holds the trained summary tokens. The
model's own files stay those of a plain Hugging Face model.
"""

from __future__ import annotations

import json
from pathlib import Path

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import ModelError
from skipvision_export.method.summary import SummaryTokens

CONFIG_FILE = "skip_vision_config.json"
WEIGHTS_FILE = "skip_vision.safetensors"


def saved_config(folder: Path) -> SkipVisionConfig | None:
    """The configuration a checkpoint was trained with, None for a stock one; raises ConfigError."""
    file = folder / CONFIG_FILE
    return SkipVisionConfig.load(file) if file.is_file() else None


def saved_summary(folder: Path) -> SummaryTokens | None:
    """Trained summary tokens in float32, None where there are none; raises ModelError."""
    from safetensors.torch import load_file

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        return None
    try:
        weights = load_file(file)
        summary = SummaryTokens(weights["ada.0.weight"].numel())
        summary.load_state_dict(weights)
    except Exception as error:  # safetensors and torch raise many kinds on a broken file
        first = (str(error).strip().splitlines() or ["?"])[0]
        raise ModelError(f"{file} holds no summary tokens: {first}") from None
    return summary.float().eval()


def save_skip_vision(folder: Path, config: SkipVisionConfig, summary: SummaryTokens | None) -> None:
    """Write both files into a checkpoint's folder."""
    from safetensors.torch import save_file

    text = json.dumps(config.to_json(), indent=1) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    if summary is not None:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in summary.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
