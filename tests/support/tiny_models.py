"""Tiny random models of every supported architecture: the transformers model and the same weights as a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 288
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, "llama"),
    "mistral": (MistralConfig, MistralForCausalLM, "llama"),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, "qwen2"),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, "qwen3"),
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class TinyModel:
    """A GGUF file, and the transformers model (float32, eval mode) that must behave the same."""

    path: Path
    reference: PreTrainedModel


def build_tiny_model(
    path: Path,
    family: str = "llama",
    *,
    storage: str = "F32",
    tied: bool = False,
    bias: bool = False,
    rope: dict[str, Any] | None = None,
    blocks: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    context: int = 256,
    seed: int = 0,
) -> TinyModel:
    """Write a random model to `path` and return it beside its reference.

    Args:
        path: where the GGUF file goes.
        family: one of `MODELS`.
        storage: a GGUF type that `gguf` can quantise to: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1. The reference
            gets the weights as they come back from it.
        tied: the output head is the embedding.
        bias: q, k and v have biases (llama; qwen2 always has them).
        rope: transformers' ``rope_parameters`` without ``rope_theta``, for example
            ``{"rope_type": "linear", "factor": 2.0}``.
    """
    config_class, model_class, architecture = MODELS[family]
    head_dim = head_dim or hidden // heads
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})},
    }
    if family == "mistral":
        settings["sliding_window"] = None
    if bias:
        settings["attention_bias"] = True
    torch.manual_seed(seed)
    reference = model_class(config_class(**settings)).float().eval()
    writer = gguf.GGUFWriter(path, architecture)
    _write_config(writer, reference, rope or {}, head_dim)
    write_byte_tokenizer(writer)
    _write_weights(writer, reference, architecture, storage, tied)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, reference)


def reference_logits(model: PreTrainedModel, ids: list[int]) -> NDArray[np.float32]:
    """float32[len(ids), vocab]."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return np.asarray(logits.float().numpy())


def write_byte_tokenizer(writer: gguf.GGUFWriter, chat_template: str | None = CHATML, vocab: int = VOCAB) -> None:
    """The smallest byte-level vocabulary: 256 bytes, one merge, three control tokens, and unused rows."""
    from synapse.models.pre_tokenizers import byte_of_character

    character = {byte: text for text, byte in byte_of_character().items()}
    tokens = [*CONTROL_TOKENS, *(character[byte] for byte in range(256)), "th"]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257
    unused = vocab - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(unused))])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * unused])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _write_config(writer: gguf.GGUFWriter, model: PreTrainedModel, rope: dict[str, Any], head_dim: int) -> None:
    config = model.config
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    match rope.get("rope_type"):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        case "llama3":
            plain = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
            scaled = model.model.rotary_emb.inv_freq.numpy()
            writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))


def _write_weights(
    writer: gguf.GGUFWriter, model: PreTrainedModel, architecture: str, storage: str, tied: bool
) -> None:
    config, generator = model.config, torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("o_proj.bias"):  # GGUF's Llama has none
            weight.data.zero_()
            continue
        if tied and name == "lm_head.weight":
            continue
        # Larger than the usual initialisation, so that a mistake anywhere shows in the logits.
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1.0 + 0.2 * noise if "norm" in name else 0.1 * noise if weight.ndim == 1 else 0.15 * noise
        type_ = gguf.GGMLQuantizationType[storage if weight.ndim == 2 else "F32"]
        stored = quantize(weight.data.numpy(), type_)
        weight.data = torch.from_numpy(np.array(dequantize(stored, type_), dtype=np.float32)).reshape(weight.shape)
        if architecture == "llama" and ".q_proj." in name:
            stored = _interleave(stored, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            stored = _interleave(stored, config.num_key_value_heads)
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(stored), raw_dtype=type_)


def _interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The order in which llama.cpp's converter stores the rows of q and k of Llama models."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, block, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{block}.{NAMES[part]}.{kind}"
