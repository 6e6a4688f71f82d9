"""Larger models of the architectures that people run, from file to answer: random weights in their true shapes.

Of their blocks, which are all alike, they have a few.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.engine_runs import run
from support.native_engine import distances, tiny_adapter, write_adapter
from support.true_shapes import LLAMA_3_2_1B, QWEN_2_5_HALF_B, Shape, write_true_shape
from synapse.engines import Limits, Request, Sampling
from synapse.engines.cache.blocks import BLOCK_TOKENS
from synapse.engines.native.packed.file import open_packed
from synapse.engines.native.packed.source_hash import source_sha256
from synapse.engines.opening import open_engine_file
from synapse.engines.reference.lora import Stack, lora_layer
from synapse.engines.reference.transformer import Chunk, ReferenceTransformer
from synapse.engines.reference.weights import packed_weights
from synapse.models.adapters.adapter import read_adapter
from synapse.models.gguf_file import open_model_file

BLOCKS = 5
"""With more bits in the first and the last, as files of 4 bits have them."""
BOUND = 0.1
"""Mean distance of a row from the reference's with the same weights, as a share of its spread."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", [LLAMA_3_2_1B, QWEN_2_5_HALF_B], ids=["Llama-3.2-1B", "Qwen2.5-0.5B"])
def test_a_true_shape_answers_as_the_reference_does(shape: Shape, at_home: Path, tmp_path: Path) -> None:
    path = write_true_shape(tmp_path / "model.gguf", replace(shape, blocks=BLOCKS))
    limits = Limits(max_context=256, threads=2, layer_precision="float16")
    engine = open_engine_file(path, "native", limits)
    assert (engine.config.vocab, engine.config.head_dim, engine.config.tied) == (shape.vocab, 64, True)
    folder = write_adapter(tmp_path / "layer", tiny_adapter(engine.config, rank=8, size=0.5), "F16")
    layer = engine.load_layer(folder)
    random = np.random.default_rng(1)
    prompt = (0, shape.vocab - 1, *random.integers(0, shape.vocab, 38).tolist())
    greedy = Sampling(temperature=0)
    requests = [Request(prompt, ids, greedy, max_tokens=4, ignore_eos=True) for ids in (((layer, 1.0),), ())]
    answers = [answer.tokens for answer in run(engine, *requests)]
    alone = [engine.logits((*prompt, *answer), each.layers) for each, answer in zip(requests, answers, strict=True)]
    engine.close()
    for tokens, logits in zip(answers, alone, strict=True):
        assert logits[39:43].argmax(axis=1).tolist() == tokens

    file = open_model_file(path)
    packed = open_packed(file, source_sha256(path, at_home / "packed"), at_home / "packed")
    reference = ReferenceTransformer(packed_weights(packed), 256)
    stacks: list[Stack] = [((lora_layer(read_adapter(folder, file.config)), 1.0),), ()]
    tokens = [np.array([*prompt, *answer]) for answer in answers]
    tables = [np.arange(2) + 2 * n for n in range(2)]
    assert len(tokens[0]) <= 2 * BLOCK_TOKENS
    chunks = [Chunk(ids, 0, table, stack, len(ids)) for ids, table, stack in zip(tokens, tables, stacks, strict=True)]
    expected = reference.forward(chunks, reference.new_cache(4)).values
    packed.close()
    found = distances(np.concatenate(alone), expected)
    assert found.mean() < BOUND
    assert found.max() < 2 * BOUND
