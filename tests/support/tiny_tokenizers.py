"""Small tokenizers trained on the spot: the reference in transformers, and the same vocabulary written as GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast, Qwen2TokenizerFast
from transformers.tokenization_utils_base import generate_merges

from support.small_gguf import write_small_gguf

# As published in the tokenizer.json of Meta-Llama-3-8B.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = (
    "The quick brown fox can't jump over 1234567 lazy dogs; it's 12:30 and they'll wait.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю в 2024 году!",
    "你好，世界。今天是2024年11月21日，天气很好！",  # noqa: RUF001
    "مرحبا بالعالم، كيف حالك اليوم؟ ١٢٣٤٥",
    "नमस्ते दुनिया, आप कैसे हैं? १२३",
    "👩‍👩‍👧‍👦 family, 🎉🎉 party, 🇮🇳 flag, ☕ and 🤷🏽‍♀️",
    "def fib(n):\n\tif n < 2:\n        return n\n    return fib(n-1) + fib(n - 2)  # O(2**n)\n\n\nprint(fib(10))\r\n",
    '<div class="x">a &amp; b</div>   \n\n  x+=1;\n',
    "cafe\u0301 naïve ｆｕｌｌ ﬁ ½ Ⅷ  \u00a0 \u3000 end ",  # noqa: RUF001
    "a",
    " leading and trailing ",
    "\n",
)
"""Five scripts, emoji, code, odd spaces, and characters that Unicode can write in two ways."""

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level_reference(kind: str) -> tuple[PreTrainedTokenizerFast, tokenizers.Tokenizer]:
    """A trained byte-level tokenizer of a kind (`smollm`, `llama-bpe`, `qwen2`, `gpt-2`), as transformers has it."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    backend.pre_tokenizer = _pre_tokenizer(kind)
    backend.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if kind == "qwen2":  # transformers' own class brings its own pattern and normaliser
        vocab, merges = _parts(backend)
        reference = Qwen2TokenizerFast(vocab=vocab, merges=merges)
        reference.add_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in CONTROL])
        return reference, backend
    return PreTrainedTokenizerFast(tokenizer_object=backend), backend


def write_byte_level(path: Path, kind: str | None, backend: tokenizers.Tokenizer) -> Path:
    """The same vocabulary as a GGUF file, which says nothing of words when there is no kind."""
    vocab, merges = _parts(backend)
    tokens = sorted(vocab, key=vocab.__getitem__)

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if kind is not None:
            writer.add_tokenizer_pre(kind)
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.CONTROL if t in CONTROL else gguf.TokenType.NORMAL for t in tokens])
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_eos_token_id(vocab["<|endoftext|>"])

    return write_small_gguf(path, tokenizer=write, vocab=len(tokens))


def sentencepiece_parts() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types as SentencePiece's BPE trainer lays them out: control, bytes, merges, characters."""
    trained = tokenizers.SentencePieceBPETokenizer(add_prefix_space=True)
    # Without the rarest letters, so that bytes have work to do.
    trained.train_from_iterator(TEXTS[:5] * 3, vocab_size=500, limit_alphabet=120, show_progress=False)
    vocab = trained.get_vocab()
    pieces = [p for p in sorted(vocab, key=vocab.__getitem__) if p != "<unk>"]
    words, letters = [p for p in pieces if len(p) > 1], [p for p in pieces if len(p) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters))]
    return tokens, scores, kinds


def sentencepiece_reference(tokens: Sequence[str], scores: Sequence[float]) -> LlamaTokenizerFast:
    """transformers' Llama tokenizer over that vocabulary."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)), skip_tokens={"<unk>", "<s>", "</s>"})
    return LlamaTokenizerFast(vocab=vocab, merges=merges, legacy=True)


def sentencepiece_writer(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> Callable[[gguf.GGUFWriter], None]:
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(list(tokens))
        writer.add_token_scores(list(scores))
        writer.add_token_types(list(kinds))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    return write


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    match kind:
        case "smollm":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
        case "llama-bpe":
            return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), bytes_only])
        case "qwen2":
            pattern = LLAMA3_PATTERN.replace("{1,3}", "")
            return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])
        case _:
            return plain


def _parts(backend: tokenizers.Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(backend.to_str())["model"]
    return backend.get_vocab(), [tuple(merge) for merge in model["merges"]]
