"""Models from disk: GGUF files, Hugging Face and converted (Orbax) directories, and aliases that fetch."""

from fineserve_jax.loaders.chat import ChatOptions, encode_chat, render_chat
from fineserve_jax.loaders.fetch import ALIASES, fetch
from fineserve_jax.loaders.load import convert, load_model
from fineserve_jax.loaders.loaded_model import LoadedModel
from fineserve_jax.loaders.stream_decoder import StreamDecoder
from fineserve_jax.loaders.tokenizer import Tokenizer

__all__ = [
    "ALIASES",
    "ChatOptions",
    "LoadedModel",
    "StreamDecoder",
    "Tokenizer",
    "convert",
    "encode_chat",
    "fetch",
    "load_model",
    "render_chat",
]
