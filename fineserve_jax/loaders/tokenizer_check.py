"""Whether two tokenizers are one, tried on texts that show differences: a conversion must not change a model's ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.tokenizer import Tokenizer

_TEXTS = (
    *("", " ", "  ", "   ", " " * 5, " " * 16, " " * 33, "\n", "\n\n", "\r\n", "\t", "\t\t", " \n ", "\n    x"),
    *("\u00a0", "\u3000", "Hello, world!", " Hello", "  Hello", "I'll DON'T y'all'd", "camelCase snake_case XMLHttp"),
    *("12 123 1234 12345.67 1,000", "naïve e\u0301 ﬁne İ Straße", "Привет мир γειά", "你好世界 日本語 한국어"),
    *("العربية עברית ไทย नमस्ते", "🙂 👩\u200d👧 🇩🇪", "½ ② ١٢٣", "def f(x):\n    return x**2  # c\n\n", "\x00\x1f\ufffd"),
    *("<p>a &amp; b</p>", "a▁b ▁▁ Ġ", "(a) [b] {c} <d> == != -> // …"),
)
_MOST_SPECIAL = 2000  # added tokens that are tried


def check_same_ids(tokenizer: Tokenizer, saved: Tokenizer) -> None:
    """Raises ModelLoadError where a text is encoded, or its ids are decoded, otherwise than by `tokenizer`."""
    for text in _probes(tokenizer):
        for added in (False, True):
            wanted, found = (one.encode(text, add_special_tokens=added) for one in (tokenizer, saved))
            if wanted != found:
                raise ModelLoadError(
                    f"the converted tokenizer would encode {text!a} as {found[:16]}, the original gives {wanted[:16]}; "
                    "nothing was written. Use the original model, and report this"
                )
        if tokenizer.decode(wanted) != saved.decode(wanted):
            raise ModelLoadError(
                f"the converted tokenizer would decode {wanted[:16]} as {saved.decode(wanted)!a}, the original gives "
                f"{tokenizer.decode(wanted)!a}; nothing was written. Use the original model, and report this"
            )


def _probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of all kinds, and the added tokens alone and between words and spaces."""
    yield from _TEXTS
    added = (token.content for token in tokenizer.backend.get_added_tokens_decoder().values())
    for token in itertools.islice(added, _MOST_SPECIAL):
        yield from (token, f"a{token}b", f" {token}  b", f"{token} \n{token}")
