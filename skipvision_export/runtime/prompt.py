"""From a picture and a prompt to arrays, with the checks that a user's mistake needs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from skipvision_export.errors import InputError
from skipvision_export.graph.passes.names import GRID
from skipvision_export.runtime.varying import Patches

Picture = str | Path | Image.Image
Pictures = Picture | Sequence[Picture] | None


@dataclass(frozen=True)
class PromptInputs:
    """input_ids [1, S] int64 with one placeholder for each visual token, pixel_values [N, 3, h, w].

    N pictures (crops, where each is an image of its own to the decoder) in the order of their placeholders;
    it may be 0. The number of placeholders is the model's own, or, after `resize_placeholders`, the layout's.
    Of a tiled image, pixel_values are [1, T, 3, h, w] and image_sizes [1, 2] its height and width; of
    pictures of any shape they are patches.
    """

    input_ids: npt.NDArray[np.int64]
    pixel_values: npt.NDArray[np.float32] | Patches
    image_sizes: npt.NDArray[np.int64] | None = None


def listed(images: Pictures) -> list[Picture]:
    """One picture, several or none as a list."""
    if images is None:
        return []
    return [images] if isinstance(images, (str, Path, Image.Image)) else list(images)


def load_image(image: Picture) -> Image.Image:
    """Decode a picture fully; raises InputError if it is missing, truncated or no picture."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    file = Path(image)
    if not file.is_file():
        raise InputError(f"picture {file} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of a broken file ends in the error, if in one
            with Image.open(file) as picture:
                return picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        raise InputError(f"picture {file} is truncated or no picture ({error})") from None


def user_turn(question: str, images: int) -> dict[str, Any]:
    """A question about pictures, which come first, as chat templates take it."""
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}


def chat_prompt(processor: Any, question: str, images: int) -> str:
    """The chat template's prompt for a question, one placeholder for each picture."""
    prompt: str = processor.apply_chat_template([user_turn(question, images)], add_generation_prompt=True)
    return prompt


def prompt_text(processor: Any, prompt: str, images: int = 1) -> str:
    """Apply the chat template to a question, or take a prompt that holds the placeholders as it is.

    Raises InputError for a prompt that has not one place for each of its pictures.
    """
    token = processor.image_token
    if not prompt.strip():
        raise InputError("the prompt is empty; ask something about the picture")
    places = prompt.count(token)
    if places == 0 and processor.chat_template:
        prompt = chat_prompt(processor, prompt, images)
        places = prompt.count(token)
    if places != images:
        raise InputError(
            f"the prompt has {places} {token} placeholders, expected {images}: one for each picture"
        )
    return prompt


def prepare(processor: Any, images: Pictures, prompt: str, visual_tokens: int | None) -> PromptInputs:
    """Arrays of pictures and a question, or of a whole prompt that holds their placeholders.

    visual_tokens: of a picture, or of each of its crops; None where it varies with the picture's size (tiled
    models, and pictures of any shape).

    Raises InputError for a picture or a prompt that cannot be used.
    """
    pictures = listed(images)
    return encode_prompt(processor, pictures, prompt_text(processor, prompt, len(pictures)), visual_tokens)


def encode_prompt(
    processor: Any, pictures: Sequence[Picture], text: str, visual_tokens: int | None
) -> PromptInputs:
    """Arrays of pictures and a text that holds a placeholder for each of them; raises as `prepare`."""
    several_tiled = visual_tokens is None and not hasattr(processor.image_processor, "merge_size")
    if several_tiled and len(pictures) > 1:
        raise InputError(
            f"got {len(pictures)} pictures; of a model that cuts its picture into tiles a prompt has one"
        )
    loaded = [load_image(picture) for picture in pictures]
    try:
        batch = processor(**({"images": loaded} if loaded else {}), text=text, return_tensors="np")
    except ValueError as error:  # PaliGemma's wants a picture, Qwen's none that is 200 times as long as wide
        why = str(error).splitlines()[0]
        raise InputError(f"the model's processor does not take the prompt: {why}") from None
    ids = np.asarray(batch["input_ids"], np.int64)
    if not pictures:
        return PromptInputs(ids, np.zeros((0, 3, 0, 0), np.float32))
    pixels = np.asarray(batch["pixel_values"], np.float32)
    if GRID in batch:
        return PromptInputs(ids, Patches(pixels, np.asarray(batch[GRID], np.int64)))
    if visual_tokens is not None:
        # Idefics3's processor puts a prompt's crops behind an axis of prompts.
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        # Gemma3's processor calls the token in front of a picture its image token, its tokenizer does not.
        token = getattr(processor.tokenizer, "image_token_id", None) or processor.image_token_id
        found = int((ids == token).sum())
        if found != len(pixels) * visual_tokens:
            raise InputError(
                f"the processor made {found} visual tokens of {len(pixels)} pictures or crops, the model has "
                f"{visual_tokens} for each: its sizes or numbers of tokens do not fit the model"
            )
    sizes = batch.get("image_sizes") if visual_tokens is None else None
    return PromptInputs(ids, pixels, None if sizes is None else np.asarray(sizes, np.int64))


def resize_placeholders(
    inputs: PromptInputs, image_token: int, visual_tokens: int | None, total: int
) -> PromptInputs:
    """Give each picture `total` placeholders in input_ids [1, S] in place of `visual_tokens`.

    visual_tokens None: each run of placeholders is one picture.
    Raises InputError for a run of placeholders that is no multiple of `visual_tokens`.
    """
    ids = inputs.input_ids[0]
    places = ids == image_token
    edges = np.flatnonzero(np.diff(places, prepend=False, append=False)).reshape(-1, 2)
    sizes = edges[:, 1] - edges[:, 0]
    pictures_of = np.ones_like(sizes) if visual_tokens is None else sizes // visual_tokens
    if visual_tokens is not None and (sizes % visual_tokens).any():
        raise InputError(
            f"the prompt has runs of {sizes.tolist()} placeholders; expected a multiple of the model's "
            f"{visual_tokens} visual tokens in each"
        )
    parts, at = [], 0
    for (start, end), pictures in zip(edges, pictures_of, strict=True):
        parts += [ids[at:start], np.full(pictures * total, image_token, np.int64)]
        at = end
    return replace(inputs, input_ids=np.concatenate([*parts, ids[at:]])[None])
