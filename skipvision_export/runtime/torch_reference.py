"""PyTorch as a backend of comparisons: the Hugging Face model itself, dense or patched."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipvision_export.config import SkipVisionConfig
from skipvision_export.method import SkipVisionState, apply_skip_vision, saved_summary
from skipvision_export.models.loading import ModelSource, load_model, load_processor
from skipvision_export.runtime.generation import Transcript
from skipvision_export.runtime.pipeline import eos_tokens
from skipvision_export.runtime.prompt import PromptInputs, prepare


class TorchReference:
    """`model.generate()`, with every step's logits and the cache right after prefill."""

    def __init__(self, source: ModelSource, model: Any = None) -> None:
        """model: an already loaded one; else its weights are loaded in float32."""
        self.source = source
        self.model = load_model(source) if model is None else model
        self.processor = load_processor(source.folder)
        self.visual_tokens = source.family.visual_tokens(source.config)
        self.eos = eos_tokens(source.folder, self.processor)
        summary = saved_summary(source.folder)
        self.summary = None if summary is None else summary.to(self.model.dtype)

    def prepare(self, image: str | Path | Any, prompt: str) -> PromptInputs:
        """Arrays of a picture and a prompt, with the model's own placeholders; raises InputError."""
        visual = None if self.source.family.tiled else self.visual_tokens
        return prepare(self.processor, image, prompt, visual)

    def decode_text(self, token_ids: list[int]) -> str:
        """Text of generated ids, special tokens left out."""
        text: str = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    @torch.no_grad()
    def pack(self, features: np.ndarray, inputs: PromptInputs) -> np.ndarray:
        """What the dense decoder reads of raster features [1, T*V, D]: packed, where tiled."""
        if inputs.image_sizes is None:
            return features
        model: Any = self.model.model
        crops = torch.from_numpy(features)[0].unflatten(0, (-1, self.visual_tokens)).to(self.model.dtype)
        sizes = torch.from_numpy(inputs.image_sizes)
        packed, _ = model.pack_image_features(
            [crops], sizes, self.model.config.vision_feature_select_strategy, model.image_newline
        )
        return np.asarray(packed[0][None].float().numpy())

    @torch.no_grad()
    def run(
        self,
        inputs: PromptInputs,
        max_new_tokens: int = 64,
        config: SkipVisionConfig | None = None,
        keep_kv: bool = False,
    ) -> tuple[Transcript, SkipVisionState | None]:
        """Generate greedily, dense or under `apply_skip_vision(config)`.

        Patched, the summary tokens are those trained with the model, where it has any, and prompt
        tokens are counted with the layout's placeholders. Returns the transcript and, where patched,
        the state that tells the choice of tokens.
        """
        ids = torch.from_numpy(inputs.input_ids)
        sizes = inputs.image_sizes
        tiles = {} if sizes is None else {"image_sizes": torch.from_numpy(sizes)}
        patch = None if config is None else apply_skip_vision(self.model, config, summary=self.summary)
        with patch or nullcontext() as state:
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.from_numpy(inputs.pixel_values).to(self.model.dtype),
                **tiles,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(self.eos) or None,
                pad_token_id=self.eos[0] if self.eos else 0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = out.sequences[0, ids.shape[1] :].tolist()
        done = Transcript(
            token_ids=tokens,
            logits=[step[0].float().numpy() for step in out.logits],
            prompt_tokens=ids.shape[1] if state is None else state.prompt_length,
        )
        layers = out.past_key_values.layers
        # The last token is chosen but never fed, so decode appended one fewer than was generated.
        kept = layers[0].keys.shape[2] - (len(tokens) - 1)
        done.kv_tokens_after_prefill = kept
        if keep_kv:
            done.kv = [
                np.asarray(tensor[0, :, :kept].float().numpy())
                for layer in layers
                for tensor in (layer.keys, layer.values)
            ]
        return done, state
