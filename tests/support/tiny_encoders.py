"""Random encoders of every supported architecture, as transformers saves them, and the vectors it makes of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)

from benchmarks.texts import SENTENCES

BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
XLM_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
XLM_PADDING = 1
VOCAB = 600


@dataclass(frozen=True)
class TinyEncoder:
    """A folder, and the transformers model (float32, eval mode) that must behave the same."""

    folder: Path
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: str
    max_tokens: int


def build_tiny_encoder(
    folder: Path,
    architecture: str = "bert",
    *,
    pooling: str = "mean",
    blocks: int = 2,
    hidden: int = 48,
    heads: int = 4,
    intermediate: int = 80,
    max_tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TinyEncoder:
    """Write a random encoder and return it beside its reference, whose weights are those that `dtype` can hold."""
    folder.mkdir(parents=True)
    xlm = architecture == "xlm-roberta"
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_tokens + (XLM_PADDING + 1 if xlm else 0),
    }
    if xlm:
        settings |= {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
    reference = XLMRobertaModel(XLMRobertaConfig(**settings)) if xlm else BertModel(BertConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in reference.named_parameters():
        # Larger than the usual initialisation, so that a mistake anywhere shows in the vectors.
        noise = torch.randn(weight.shape, generator=generator)
        spread = 0.3 if weight.ndim == 1 or "embeddings" in name else 1.2 * weight.shape[-1] ** -0.5
        weight.data = (noise * spread + (1 if name.endswith("LayerNorm.weight") else 0)).to(dtype)
    reference.save_pretrained(folder)
    write_tokenizer(folder, architecture, max_tokens)
    (folder / "1_Pooling").mkdir()
    flags = {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden, **flags})
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    write_json(
        folder / "modules.json",
        [{"idx": 0, "name": "", "path": p, "type": f"sentence_transformers.models.{k}"} for p, k in kinds.items()],
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TinyEncoder(folder, reference.float().eval(), tokenizer, pooling, max_tokens)


def reference_vectors(encoder: TinyEncoder, texts: Sequence[str]) -> NDArray[np.float32]:
    """What sentence-transformers does, with transformers alone and one text at a time: float32[texts, hidden]."""
    vectors = []
    with one_thread(), torch.no_grad():
        for text in texts:
            tokens = encoder.tokenizer(text, truncation=True, max_length=encoder.max_tokens, return_tensors="pt")
            hidden = encoder.reference(**tokens).last_hidden_state[0]
            pooled = hidden[0] if encoder.pooling == "cls" else hidden.mean(dim=0)
            vectors.append((pooled / pooled.norm()).numpy())
    return np.stack(vectors)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's threads wait for one another by spinning: on a busy machine one is many times faster than two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_tokenizer(folder: Path, architecture: str, max_tokens: int) -> None:
    """A tokenizer trained on the spot, as transformers' own classes save it."""
    if architecture == "bert":
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.train_from_iterator(
            SENTENCES, trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=BERT_TOKENS, show_progress=False)
        )
        vocab = backend.get_vocab()
        BertTokenizer(vocab=vocab, model_max_length=max_tokens).save_pretrained(folder)
    else:
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=VOCAB - 1, special_tokens=XLM_TOKENS[:4], unk_token="<unk>", show_progress=False
        )
        backend.train_from_iterator(SENTENCES, trainer)
        pieces = [tuple(each) for each in json.loads(backend.to_str())["model"]["vocab"]]
        XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=max_tokens).save_pretrained(folder)
