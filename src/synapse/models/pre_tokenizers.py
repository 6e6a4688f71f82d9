"""How byte-level BPE cuts text into words before merging: one rule per name in `tokenizer.ggml.pre`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from tokenizers import Regex, normalizers, pre_tokenizers

from synapse.errors import InvalidInput
from synapse.models.errors import UnsupportedModel

# The patterns are part of each model's definition and are published in its tokenizer.json.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizerRule:
    """How a family of models prepares text.

    Attributes:
        pattern: what a word is; empty for GPT-2's own pattern.
        single_digits: digits are cut off one by one before anything else.
        nfc: text is brought into Unicode's composed form first.
        ignore_merges: a word that is a token as a whole is that token, however the merges would build it.
        add_bos: whether plain text begins with BOS when the file does not say.
    """

    pattern: str = ""
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        if self.pattern:
            split = pre_tokenizers.Split(Regex(self.pattern), behavior="isolated")
            steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        else:
            steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if self.single_digits:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        return pre_tokenizers.Sequence(steps)


_LLAMA3_RULE = PreTokenizerRule(LLAMA3, ignore_merges=True, add_bos=True)
_QWEN2_RULE = PreTokenizerRule(QWEN2, nfc=True)

PRE_TOKENIZERS: dict[str, PreTokenizerRule] = {
    "default": PreTokenizerRule(),
    "gpt-2": PreTokenizerRule(),
    "smollm": PreTokenizerRule(single_digits=True),
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": PreTokenizerRule(QWEN2),
    "tekken": PreTokenizerRule(TEKKEN, ignore_merges=True, add_bos=True),
}
"""The rule of each name that llama.cpp writes into `tokenizer.ggml.pre`."""

KEY = "tokenizer.ggml.pre"
UNSAID = "the file does not say how its text is cut into words before merging (tokenizer.ggml.pre)"
HOW_TO_SAY = (
    "say which with `synapse model pull FILE --pre-tokenizer NAME`: llama-bpe for Llama 3, qwen2 for Qwen 2 to 3,"
    " smollm for SmolLM2, tekken for Mistral NeMo, gpt-2 for GPT-2's own; or convert the model with a newer llama.cpp"
)


def check_known(said: str) -> None:
    """Whether there is a rule of this name; empty is none.

    Raises:
        InvalidInput: there is not; the hint names the nearest.
    """
    if said and said not in PRE_TOKENIZERS:
        near = difflib.get_close_matches(said.lower(), PRE_TOKENIZERS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        raise InvalidInput(f"there is no pre-tokenizer {said[:40]!r}", hint=f"{hint} {', '.join(PRE_TOKENIZERS)}")


def pre_tokenizer_name(metadata: Mapping[str, object], said: str = "") -> str:
    """The name of the rule that a vocabulary is to be used with: what its file says, or else what somebody `said`.

    Empty when neither does, and for SentencePiece, which has no such rule.

    Raises:
        UnsupportedModel: the file's is none that is known here.
        InvalidInput: what was said is not known, or not what the file says.
    """
    check_known(said)
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        if said:
            raise InvalidInput("this model's vocabulary has no pre-tokenizer to choose", hint="leave it out")
        return ""
    written = metadata.get(KEY, "")
    if written and written not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"the pre-tokenizer {str(written)[:40]!r} is not supported",
            hint=f"supported are {', '.join(PRE_TOKENIZERS)}",
        )
    if written and said and PRE_TOKENIZERS[str(written)] != PRE_TOKENIZERS[said]:
        raise InvalidInput(f"the file says that its pre-tokenizer is {written}, not {said}", hint="leave it out")
    return str(written or said)


@cache
def byte_of_character() -> dict[str, int]:
    """Which byte each of the 256 printable characters stands for in a byte-level vocabulary (as in GPT-2).

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
