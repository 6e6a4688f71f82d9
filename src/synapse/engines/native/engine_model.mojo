"""What the kernel is given: a model, and a step for it to compute. `structs.py` has the same fields, one by one."""

from engine_attention import Table
from engine_choice import Choice
from engine_lora import Rows
from engine_matrix import Bytes, Floats, Halves, Inputs, Matrix
from engine_pool import Pool

comptime WHOLE = 0  # the task is a step of a transformer
comptime ONE_MAP = 1  # the task is one linear map: h = matrix x, for an encoder

comptime Addresses = Pointer[Int, MutUntrackedOrigin]


@fieldwise_init
struct Layer(Copyable, Movable):
    """The weights of one transformer block; `native.structs.Layer` has the same fields."""

    var attention_norm: Floats
    var ffn_norm: Floats
    var q_norm: Floats
    var k_norm: Floats
    var q: Matrix
    var k: Matrix
    var v: Matrix
    var o: Matrix
    var gate: Matrix
    var up: Matrix
    var down: Matrix


@fieldwise_init
struct Model(Copyable, Movable):
    """A model, likewise."""

    var blocks: Int
    var hidden: Int
    var heads: Int
    var kv_heads: Int
    var head_dim: Int
    var half: Int  # of the dimensions that are rotated
    var vocab: Int
    var qk_norm: Int
    var epsilon: Float64
    var scale: Float64  # of attention scores
    var cos: Floats  # [context, half]
    var sin: Floats
    var output_norm: Floats
    var embedding: Matrix
    var output: Matrix
    var layers: Pointer[Layer, MutUntrackedOrigin]


@fieldwise_init
struct Step(Copyable, Movable):
    """One call, likewise. `rows` are the tokens of all sequences; a chunk is the rows of one sequence."""

    var task: Int  # WHOLE or ONE_MAP
    var model: Pointer[Model, MutUntrackedOrigin]
    var pool: Pointer[Pool, MutUntrackedOrigin]
    var rows: Int
    var chunks: Int
    var wanted: Int
    var layers: Int  # LoRA layers of the batch
    var narrow: Int  # whether one of them has factors of 8 bits, which read the 8-bit form of their inputs
    var pairs: Int  # of a row and a layer
    var rank_room: Int
    var cache_blocks: Int
    var score_room: Int
    var tokens: Table  # [rows] each
    var positions: Table
    var slots: Table
    var chunk_rows: Table  # [chunks] each: the first row,
    var chunk_counts: Table  # how many rows,
    var chunk_starts: Table  # the position of the first,
    var chunk_tables: Addresses  # and the block table
    var wanted_rows: Table  # [wanted]
    var layer_tables: Addresses  # [layers] each: its factors [blocks, MAPS],
    var layer_pairs: Table  # its first pair,
    var layer_counts: Table  # and how many
    var pair_rows: Rows  # [pairs]
    var pair_weights: Floats
    var keys: Halves
    var values: Halves
    var x: Floats  # scratch from here: [rows, hidden padded]
    var h: Floats
    var q: Floats
    var k: Floats
    var v: Floats
    var mixed: Floats
    var gate: Floats
    var up: Floats
    var u: Floats  # [3, pairs, rank_room]
    var scores: Floats  # [threads, MOST_QUERIES, score_room]
    var inputs: Inputs  # of the phase
    var inner: Inputs  # of the map down
    var logits: Floats  # [wanted, vocab padded]
    var choice_room: Int  # bytes of a thread's scratch memory for choosing
    var choice_rooms: Bytes  # [threads] of them
    var choices: Pointer[Choice, MutUntrackedOrigin]  # [wanted] each: how the next token is chosen,
    var chosen: Table  # which it is, UNDECIDED if that is left to the caller,
    var finite: Table  # and whether the logits are finite
    var matrix: Matrix  # of ONE_MAP
    var span: Int  # of queries in a piece of attention, and
    var spans: Int  # how many pieces there are: `engine_step` sets both
