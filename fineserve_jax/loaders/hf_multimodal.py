"""The text part of a Hugging Face checkpoint that also takes images: its configuration, and its tensors' names.

What is for images is left out: prompts are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Keys beside `text_config` that are about images, or about where their tokens stand in a text.
_IMAGE_KEYS = frozenset(
    ("vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index")
)
_IMAGE_TENSORS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..+")
_TEXT_PREFIX = re.compile(r"(model\.language_model\.|language_model\.model\.)")


def has_text_part(raw: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is of a model that takes more than text."""
    return isinstance(raw.get("text_config"), Mapping)


def text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parsed config.json without what is about images: keys of `text_config`, and others that stand beside it."""
    if not has_text_part(raw):
        return raw
    text = raw["text_config"]
    beside = {key: value for key, value in raw.items() if key != "text_config" and key not in _IMAGE_KEYS}
    own = {key: value for key, value in text.items() if key != "architectures"}
    return {**beside, **own}


def text_tensor_name(name: str) -> str | None:
    """What a model of the text part alone calls a tensor; None for one that is about images."""
    if _IMAGE_TENSORS.fullmatch(name):
        return None
    return _TEXT_PREFIX.sub("model.", name.removeprefix("language_model.") if name.endswith("lm_head.weight") else name)
