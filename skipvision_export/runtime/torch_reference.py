"""PyTorch as a backend of comparisons: the Hugging Face model itself, dense or patched."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from skipvision_export.config import SkipVisionConfig
from skipvision_export.graph.passes.names import GRID
from skipvision_export.method import SkipVisionState, apply_skip_vision, saved_summary
from skipvision_export.models.loading import ModelSource, load_model, load_processor
from skipvision_export.runtime.pipeline import eos_tokens
from skipvision_export.runtime.prompt import Pictures, PromptInputs, prepare
from skipvision_export.runtime.rounded import load_in_int4, load_rounded
from skipvision_export.runtime.transcript import Transcript
from skipvision_export.runtime.varying import Patches


class TorchReference:
    """`model.generate()`, with every step's logits and the cache right after prefill."""

    def __init__(
        self,
        source: ModelSource,
        model: Any = None,
        *,
        dtype: str = "float32",
        weights_dtype: str | None = None,
        weights: str | None = None,
    ) -> None:
        """model: an already loaded one, else it is loaded.

        dtype: what a loaded model holds and computes in; weights_dtype: a half type that its weights
        are rounded to before they compute in float32; weights: "int4" where the decoder's matrices are
        rounded to that too. Raises ModelError as loading does.
        """
        self.source = source
        if model is None:
            if weights_dtype:
                model = load_rounded(source, weights_dtype, weights)
            else:
                model = (load_in_int4 if weights else load_model)(source, dtype)
        self.model = model
        self.processor = load_processor(source.folder)
        self.visual_tokens = source.family.visual_tokens(source.config)
        self.eos = eos_tokens(source.folder, self.processor)
        summary = saved_summary(source.folder)
        if summary is not None:
            summary = summary.to(getattr(torch, weights_dtype or dtype)).to(self.model.dtype)
        self.summary = summary

    def prepare(self, images: Pictures, prompt: str) -> PromptInputs:
        """Arrays of pictures and a prompt, with the model's own placeholders; raises InputError."""
        family = self.source.family
        visual = None if family.tiled or family.dynamic else self.visual_tokens
        return prepare(self.processor, images, prompt, visual)

    def decode_text(self, token_ids: list[int]) -> str:
        """Text of generated ids, special tokens left out."""
        text: str = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    @torch.no_grad()
    def pack(self, features: np.ndarray, inputs: PromptInputs) -> np.ndarray:
        """What the dense decoder reads of raster features [1, T*V, D]: packed, where tiled."""
        if inputs.image_sizes is None:
            return features
        crops = torch.from_numpy(features)[0].unflatten(0, (-1, self.visual_tokens)).to(self.model.dtype)
        packed = self.source.family.pack(self.model, crops, torch.from_numpy(inputs.image_sizes))
        return np.asarray(packed[None].float().numpy())

    @torch.no_grad()
    def run(
        self,
        inputs: PromptInputs,
        max_new_tokens: int = 64,
        config: SkipVisionConfig | None = None,
        keep_kv: bool = False,
        keep_features: bool = False,
        same: Transcript | None = None,
        min_new_tokens: int = 0,
    ) -> tuple[Transcript, SkipVisionState | None]:
        """Generate greedily, dense or under `apply_skip_vision(config)`.

        Patched, the summary tokens are those trained with the model, where it has any, and prompt
        tokens are counted with the layout's placeholders. Returns the transcript and, where patched,
        the state that tells the choice of tokens.

        keep_features: record the images' features, orders and places; same: a run that recorded them, whose
        laid-out features the decoder reads at their places, instead of its images' own. Both only where
        patched.
        """
        ids = torch.from_numpy(inputs.input_ids)
        found = inputs.pixel_values
        arrays = found.pixel_values if isinstance(found, Patches) else found
        given = self.source.family.inputs(
            self.source.config, ids, torch.from_numpy(arrays).to(self.model.dtype)
        )
        if not len(arrays):
            del given["pixel_values"]
        if isinstance(found, Patches):
            given[GRID] = torch.from_numpy(found.grids)
        if inputs.image_sizes is not None:
            given["image_sizes"] = torch.from_numpy(inputs.image_sizes)
        patch = None if config is None else apply_skip_vision(self.model, config, summary=self.summary)
        done = Transcript()

        def watch(raster: torch.Tensor, laid: torch.Tensor) -> torch.Tensor:
            varying = None if state is None else state.varying
            if keep_features:
                done.raster, done.laid = (x.flatten(0, 1).float().numpy() for x in (raster, laid))
                done.places = [] if varying is None else [places.numpy() for places in varying.places]
            if same is None:
                return laid
            if varying is not None:
                varying.places = [torch.from_numpy(places) for places in same.places]
            return torch.from_numpy(same.laid).to(laid.dtype).view_as(laid)

        with patch or nullcontext() as state:
            if state is not None:
                state.watch = watch
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **given,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                do_sample=False,
                eos_token_id=list(self.eos) or None,
                pad_token_id=self.eos[0] if self.eos else 0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = out.sequences[0, ids.shape[1] :].tolist()
        done.token_ids = tokens
        done.logits = [step[0].float().numpy() for step in out.logits]
        done.prompt_tokens = ids.shape[1] if state is None else state.prompt_length
        done.pictures = len(inputs.pixel_values)
        if state is not None and keep_features:
            assert state.order is not None
            done.order = [one.tolist() for one in state.order]
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
