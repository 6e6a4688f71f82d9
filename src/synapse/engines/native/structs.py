"""The structures of the kernel `engine`, field by field those of `engine_model.mojo` and its neighbours."""

from __future__ import annotations

import ctypes

from synapse.kernels.structs import words


class Matrix(ctypes.Structure):
    """A packed matrix: `Matrix` of engine_matrix.mojo."""

    _fields_ = words("records kind groups blocks bias has_bias")


class Inputs(ctypes.Structure):
    """Quantised rows: `Inputs` of engine_matrix.mojo."""

    _fields_ = words("codes8 scale8 sum8 codes16 scale16")


class Layer(ctypes.Structure):
    """The weights of one transformer block: `Layer` of engine_model.mojo."""

    _fields_ = [
        *words("attention_norm ffn_norm q_norm k_norm"),
        *((f"{name}_proj", Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
    ]


class Model(ctypes.Structure):
    """A model: `Model` of engine_model.mojo."""

    _fields_ = [
        *words("blocks hidden heads kv_heads head_dim half vocab qk_norm"),
        ("epsilon", ctypes.c_double),
        ("scale", ctypes.c_double),
        *words("cos sin output_norm"),
        ("embedding", Matrix),
        ("output", Matrix),
        *words("layers"),
    ]


class Pool(ctypes.Structure):
    """What the threads of an engine share: `Pool` of engine_pool.mojo."""

    _fields_ = words("threads jobs sleeping stop waiting limit step phases")


class Step(ctypes.Structure):
    """One call: `Step` of engine_model.mojo."""

    _fields_ = [
        *words("task model pool rows chunks wanted layers narrow pairs rank_room cache_blocks score_room"),
        *words("tokens positions slots chunk_rows chunk_counts chunk_starts chunk_tables wanted_rows"),
        *words("layer_tables layer_pairs layer_counts pair_rows pair_weights"),
        *words("keys values x h q k v mixed gate up u scores"),
        ("inputs", Inputs),
        ("inner", Inputs),
        *words("logits choice_room choice_rooms choices chosen finite"),
        ("matrix", Matrix),
        *words("span spans"),
    ]


class ChoiceFields(ctypes.Structure):
    """How a token is chosen: `Choice` of engine_choice.mojo."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p", "uniform")),
        *words("top_k edits edit_tokens edit_bias edit_factor edit_less mask"),
    ]


STRUCTS = (Matrix, Inputs, Layer, Model, Pool, Step, ChoiceFields)
"""In the order of `engine_struct_size`."""
