"""How text is split before byte-level BPE, by the names that GGUF files give it (`tokenizer.ggml.pre`).

The names are llama.cpp's; what each stands for is the pre-tokenizer, and the normalizer, of the models' own
`tokenizer.json` (or of their tiktoken pattern, for those that have none).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

Parts = Callable[[], list[PreTokenizer]]


class Splitting(NamedTuple):
    """What a name stands for.

    Attributes:
        parts: makes the pre-tokenizers, one applied to what the one before it gave.
        composed: text is normalized to NFC first.
        ignore_merges: a piece that is in the vocabulary as a whole is one token, whatever the merges say.
        add_bos: a text begins with BOS where the file does not say.
        in_bytes: tokens are written in GPT-2's alphabet of bytes; else as they are, with "▁" for a space.
    """

    parts: Parts
    composed: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    in_bytes: bool = True

    def pre_tokenizer(self) -> PreTokenizer | None:
        """All parts as one."""
        parts = self.parts()
        return None if not parts else parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


def _byte_level(words: bool) -> PreTokenizer:
    """Bytes in GPT-2's alphabet; `words` splits by GPT-2's rules first."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)


def _patterns(*patterns: str, words: bool = False) -> Parts:
    """Splits at what each pattern matches, and keeps it."""

    def parts() -> list[PreTokenizer]:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        return [*splits, _byte_level(words)]

    return parts


def _falcon() -> list[PreTokenizer]:
    punctuation, digits = pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Digits(individual_digits=False)
    thrice = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated")
    return [punctuation, _byte_level(True), digits, thrice]


def _chameleon() -> list[PreTokenizer]:
    split = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in (r"<sentinel:[0-9]+>", _CHAMELEON_IMAGE)]
    spaces = pre_tokenizers.Split(Regex(r"([\t\n]|    |  )"), behavior="isolated")
    return [*split, spaces, pre_tokenizers.Digits(True), pre_tokenizers.Punctuation("isolated"), _byte_level(True)]


def _digits() -> list[PreTokenizer]:
    return [pre_tokenizers.Digits(individual_digits=True), _byte_level(True)]


def _whole() -> list[PreTokenizer]:
    return []


def _words() -> list[PreTokenizer]:
    return [_byte_level(True)]


def _ranges(codes: str) -> str:
    """Characters and ranges of characters, given in hexadecimal, as they stand in a class of a pattern."""
    return "".join("-".join(rf"\x{{{code}}}" for code in part.split("-")) for part in codes.split())


_CHAMELEON_IMAGE = r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES
_PATH_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_HALVES = ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")

_LLAMA3 = f"{_CONTRACTIONS}|{_WORD}|\\p{{N}}{{1,3}}|{_MARKS}"
_QWEN2 = f"{_CONTRACTIONS}|{_WORD}|\\p{{N}}|{_MARKS}"
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _LINES
)  # marks belong to words
_JAIS2 = (
    f"{_CONTRACTIONS}|{_WORD}|\\p{{N}}{{1,3}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|"
    + "|".join(rf"\s{{{count}}}(?!\S)" for count in _HALVES)
    + r"|\s{1}"
)


def _cased_words(upper: str, lower: str, ending: str) -> str:
    """Words that begin with capitals, and those of capitals alone; each may have a contraction behind it."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}"


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = f"{_cased_words(_UPPER, _LOWER, '')}|\\p{{N}}|{_PATH_MARKS}"
_GPT4O = f"{_cased_words(_UPPER, _LOWER, _CONTRACTIONS + '?')}|\\p{{N}}{{1,3}}|{_PATH_MARKS}"
_NOT_HAN = r"&&[^\p{Han}]]"
_KIMI_WORDS = _cased_words(_UPPER[:-1] + _NOT_HAN, _LOWER[:-1] + _NOT_HAN, _CONTRACTIONS + "?")
_KIMI = f"\\p{{Han}}+|{_KIMI_WORDS}|\\p{{N}}{{1,3}}|{_MARKS}"
_YOUTU = f"{_cased_words(_UPPER, _LOWER, _CONTRACTIONS + '?')}|\\p{{N}}|{_PATH_MARKS}"
_YOUTU_SCRIPTS = (
    f"[{_ranges('ac00-d7a3 3131-318e')}]+|"
    f"[{_ranges('ff01 2026 201c 201d 2018 2019 2014 ff1a ff1b ff0c 3001-303f fe30-fe4f')}]+|"
    f"[{_ranges('3105-312f')}]+|[{_ranges('4e00-9fa5 3040-30ff')}]+"
)

_DEEPSEEK3 = _ASCII_MARKS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _LINES
_SPARK = _ASCII_MARKS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|" + _SPACES
_HAN_KANA = f"[{_ranges('4e00-9fa5 3040-30ff')}]+"
_DEEPSEEK_CJK = f"[{_ranges('4e00-9fa5 800-4e00 ac00-d7ff')}]+"
# Letters of the scripts that have two cases.
_DEEPSEEK_CASED = _ranges("""
    41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a 38c 38e-3a1
    3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a
    1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4
    1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128
    212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d
    a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f
    104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
""")
_DEEPSEEK_MARKS = _ranges("21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002")
_BLOOM = rf" ?[^(\s|.,!?{_ranges('2026 3002 ff0c 3001 964 6d4 60c')})]+"
_THOUSANDS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_ASIAN = _ranges(
    "4e00-9fff 3400-4dbf f900-faff 3040-30ff ff65-ff9f 2f00-2fdf e40-e7f e80-eff 1780-17ff 1000-109f aa60-aa7f "
    "a9e0-a9ff ac00-d7af 1100-11ff"
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|" + _SPACES
_SEED = _CONTRACTIONS + "|" + _WORD + r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + _LINES
_EXAONE_MOE = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|"
    + _SPACES
)
_MINICPM5 = f"{_CONTRACTIONS}|{_WORD}|\\p{{N}}+|{_MARKS}"

_deepseek3 = _patterns(r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3)
# In llama.cpp's order; the first of several names is the one that its converter writes first.
_BY_NAMES: dict[tuple[str, ...], Splitting] = {
    ("default", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de"): Splitting(_words),
    ("a.x-4.0", "mellum", "jina-v1-en", "jina-v2-code", "roberta-bpe", "exaone4"): Splitting(_words),
    ("jais", "trillion", "granite-docling"): Splitting(_words),
    ("mpt", "olmo", "modern-bert"): Splitting(_words, composed=True),
    ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"): Splitting(_digits),
    ("command-r",): Splitting(_digits, composed=True),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"): (
        Splitting(_patterns(_LLAMA3), ignore_merges=True, add_bos=True)
    ),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): Splitting(_patterns(_LLAMA3)),
    ("jais-2",): Splitting(_patterns(_JAIS2)),
    ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "stablelm2"): (
        Splitting(_patterns(_QWEN2), composed=True)
    ),
    ("hunyuan", "solar-open", "grok-2"): Splitting(_patterns(_QWEN2)),
    ("qwen35",): Splitting(_patterns(_QWEN35), composed=True),
    ("ufakzeka",): Splitting(_patterns(f"{_WORD}|\\p{{N}}|{_MARKS}"), composed=True),
    ("laguna",): Splitting(_patterns(r"[^\n]+|[\n]+", _QWEN2)),
    ("deepseek-llm",): Splitting(
        _patterns(r"[\r\n]", rf"\s?[{_DEEPSEEK_CASED}]+", rf"\s?[{_DEEPSEEK_MARKS}]+", r"\s+$", _DEEPSEEK_CJK, r"\p{N}")
    ),
    ("deepseek-coder",): Splitting(_patterns(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"): Splitting(_deepseek3),
    ("spark2_5",): Splitting(_patterns(r"\p{N}{1,3}", _HAN_KANA, _SPARK, r"\p{N}")),
    ("afmoe",): Splitting(_patterns(_THOUSANDS, f"[{_ASIAN}]+", _DEEPSEEK3)),
    ("youtu",): Splitting(_patterns(_YOUTU_SCRIPTS, _YOUTU), ignore_merges=True),
    ("falcon",): Splitting(_falcon),
    ("chameleon",): Splitting(_chameleon, add_bos=True),
    ("bloom", "poro-chat", "gpt3-finnish"): Splitting(_patterns(_BLOOM)),
    ("viking",): Splitting(_patterns(_BLOOM, r"\p{N}")),
    ("tekken",): Splitting(_patterns(_TEKKEN), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"): Splitting(_patterns(_GPT4O)),
    ("granite-embed-multi-97m",): Splitting(_patterns(_GPT4O), ignore_merges=True),
    ("tiny_aya", "cohere2moe"): Splitting(_patterns(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    ("kimi-k2",): Splitting(_patterns(_KIMI)),
    ("superbpe",): Splitting(_patterns(r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    ("bailingmoe", "bailingmoe2", "llada-moe"): Splitting(_patterns(_BAILING)),
    ("seed-coder",): Splitting(_patterns(_SEED)),
    ("exaone-moe",): Splitting(_patterns(_EXAONE_MOE)),
    ("minicpm5",): Splitting(_patterns(r"\p{N}{1,3}", _MINICPM5), ignore_merges=True),
    ("gemma4", "sarvam-moe", "granite-embed-multi-311m"): Splitting(_whole, in_bytes=False),
}
SPLITTINGS: dict[str, Splitting] = {name: splitting for names, splitting in _BY_NAMES.items() for name in names}
"""Every name with what it stands for."""
