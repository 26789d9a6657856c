"""Texts on which tokenizers differ: runs of spaces, digits, contractions, scripts, marks, emoji, special tokens."""

# ruff: noqa: RUF001, SIM905

from __future__ import annotations

import random
from collections.abc import Sequence

SPACES = [" " * count for count in (1, 2, 3, 4, 5, 7, 13, 15, 16, 17, 33, 70)]
BREAKS = [
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n",
    "\t",
    "\t\t",
    "\t\t\t",
    " \n",
    "\n ",
    "\n    ",
    "\t \t",
    "\r",
    "\f",
]
ODD_SPACES = ["\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\u1680", "\ufeff", "\x85", "\x00", "\x1f", "\v"]
WORDS = """
    the The THE don't DON'T I'll we'Ve it's y'all'd 's 'S '' camelCaseWord XMLHttp naïve Straße ǅungla façade İstanbul
    ﬁne co-op snake_case Привет мир Ёлка γειά 日本語 こんにちは カタカナ 你好世界 中文 한국어 ㄱㅏ ไทยภาษา नमस्ते
    क्षत्रिय עברית العَرَبِيّة ភាសាខ្មែរ தமிழ் 𝔘𝔫𝔦 𐐀𐐨 ʰʲ ªº ﷺ ⅣⅧ ② ½ ١٢٣٤ १२३ 𝟘𝟙𝟚 〇一二
""".split()
WORDS += ["e\u0301clair", "A\u030angstro\u0308m"]
NUMBERS = "0 12 123 1234 12345 123456 1234567 3.14159 1,000,000 0x1F4A9 1e-10 2026-11-28".split()
MARKS = r"""
    . , ! ?! ... … — – «» “quoted” ‘q’ () [] {} <> </p> <br/> == != -> // /* */ # $ € + ^ ~ ` | \ \n %20 &amp; @user
    http://a.b/c?d=e#f 、 。 ！ （） · ° ™ ☃ ≠ ∑ → ▁ ▁▁ Ġ █▓
""".split()
MARKS += ["\u0301", "\u200d", "\ufe0f", "\ufffd"]
EMOJI = ["🙂", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "👍🏽", "🇩🇪🇫🇷", "🦙🦙", "1\ufe0f\u20e3", "😶\u200d🌫️"]
CODE = [
    "def f(x):\n    return x**2",
    "if (a&&b){\n\t\tc++;\n\t}",
    "\n\n\n    \n  x",
    "SELECT * FROM t;",
    "{'k': [1, 2]}",
]
KINDS = [SPACES, SPACES, BREAKS, ODD_SPACES, WORDS, WORDS, WORDS, NUMBERS, MARKS, MARKS, EMOJI, CODE]


def hard_texts(count: int, special: Sequence[str] = (), seed: int = 0) -> list[str]:
    """As many texts, always the same; some of them hold special tokens, beside all that may stand beside them."""
    rng = random.Random(seed)
    kinds = [*KINDS, special] if special else KINDS
    spaced = [spaces + word for spaces in (" ", "  ") for word in WORDS[:6]]
    texts = ["", *SPACES, *BREAKS, *spaced, *special[:12]]
    while len(texts) < count:
        parts = []
        for _ in range(rng.randint(1, 14)):
            parts.append(rng.choice(rng.choice(kinds)))
            if rng.random() < 0.4:
                parts.append(" ")
        texts.append("".join(parts))
    return texts[:count]
