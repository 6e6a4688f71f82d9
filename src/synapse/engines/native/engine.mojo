"""One step of a transformer for all sequences of a batch: the native side of `transformer.ReferenceTransformer.forward`.

The threads of the pool go through the same phases. Within a phase they share the pieces of its work, and nobody goes on
before all of them are done (`engine_pool.mojo`). The caller's arrays may be gone when a late thread looks in, so what a
thread reads without holding a piece is only its copy of `Step`, the model and the pool. Nothing is allocated: the caller
provides every array, and `call.py` describes them.
"""

from std.atomic import Atomic
from std.sys import CompilationTarget, size_of
from std.sys.intrinsics import prefetch

from engine_attention import MOST_QUERIES, Cache, Table, attend, store_key, store_value
from engine_choice import Choice, UNDECIDED, choose_token, is_finite, room_at, room_bytes
from engine_lora import Factors, Rows, STRIP, expand, shrink, strip_of
from engine_matrix import (
    BLOCK,
    GROUP,
    Q8,
    Ahead,
    Bytes,
    Floats,
    Halves,
    Inputs,
    Matrix,
    Nothing,
    element,
    multiply,
    place_of,
    quantise,
    quantise_block,
)
from engine_model import ONE_MAP, WHOLE, Addresses, Layer, Model, Step
from engine_pool import Pool, Work, announce_job, begin_job, is_current, look, wait_for_job
from engine_rows import add, gated, rms_norm, rotate

comptime ABI_VERSION = 4
comptime UNIT = BLOCK // GROUP  # the two groups of a unit of work: its outputs are one block of the next map's inputs
comptime PIECES = 4  # a thread takes the units of a small phase in so many pieces
comptime LINE = 64  # bytes of a cache line
comptime MAPS = 7  # linear maps of a block that layers can change
comptime MANY_QUERIES = 12
comptime PHASES = 13  # of a block
comptime OTHER_PHASES = 4


@always_inline
def share(work: Work, units: Int, rows: Int) -> Int:
    """How many units of work a thread takes at a time."""
    return 1 if rows >= 8 else max(1, units // (work.threads() * PIECES))


@always_inline
def factors_of(step: Step, layer: Int, block: Int, map: Int) -> Factors:
    comptime Record = Pointer[Factors, MutUntrackedOrigin]
    var table = Record(unsafe_from_address=step.layer_tables.unsafe_offset(layer)[])
    return table.unsafe_offset(block * MAPS + map)[]


@fieldwise_init
struct Strip(Copyable, Movable, ImplicitlyCopyable):
    """A strip of the A of one layer and one of some linear maps."""

    var layer: Int
    var slot: Int  # the number of the map
    var strip: Int
    var factors: Factors


@always_inline
def strip_at(step: Step, block: Int, first: Int, count: Int, index: Int) -> Strip:
    """The strips of `count` maps from `first` on, of all layers, one after the other."""
    var strips = step.rank_room // STRIP
    var strip, map = index % strips, index // strips
    var layer, slot = map // count, map % count
    return Strip(layer, slot, strip, factors_of(step, layer, block, first + slot))


def shrink_all(
    step: Step, work: Work, phase: Int, block: Int, first: Int, count: Int, x: Floats, inputs: Inputs, stride: Int
):
    """What `count` linear maps from `first` on, which have the same inputs, need of A x."""
    var strips = step.rank_room // STRIP
    var total = step.layers * count * strips
    var length = max(1, total // (work.threads() * PIECES))
    var pieces = (total + length - 1) // length
    while True:
        var begin = work.take(phase, pieces)
        if begin < 0:
            break
        begin *= length
        var end = min(begin + length, total)
        var here = strip_at(step, block, first, count, begin)
        for index in range(begin, end):
            var next = strip_at(step, block, first, count, index + 1) if index + 1 < end else here
            if here.strip * STRIP < here.factors.rank:
                var pair = Int(step.layer_pairs.unsafe_offset(here.layer)[])
                var target = step.u.unsafe_offset((here.slot * step.pairs + pair) * step.rank_room)
                var rows = step.pair_rows.unsafe_offset(pair)
                var weights = step.pair_weights.unsafe_offset(pair)
                var number = Int(step.layer_counts.unsafe_offset(here.layer)[])
                var coming = strip_of(next.factors, next.strip, stride)
                var all, room = step.rows, step.rank_room
                shrink(here.factors, here.strip, stride, x, inputs, all, rows, weights, number, target, room, coming)
            here = next
        work.done(phase)
    work.wait(phase, pieces)


struct Coming(Ahead):
    """A share of some linear maps' A, or of their B, of all layers of a step, a few lines at a time: many requests at once
    would only queue, and what is computed with them.
    """

    var tables: Addresses
    var layers: Int
    var record: Int  # of the first of `count` maps
    var count: Int
    var outputs: Bool  # whether it is B
    var first: Int  # of the inputs or outputs of the share,
    var numbers: Int  # how many they are,
    var layer: Int  # which layer and map are next,
    var map: Int
    var at: Int  # the next line,
    var end: Int
    var lines: Int  # and how many are asked for at a time

    def __init__(
        out self,
        step: Step,
        block: Int,
        map: Int,
        count: Int,
        outputs: Bool,
        width: Int,
        part: Int,
        parts: Int,
        records: Int,
    ):
        """A part of so many, which so many records are to ask for. `width` are the maps' inputs or outputs."""
        self.tables, self.layers = step.layer_tables, step.layers if block < step.model[].blocks else 0
        self.record, self.count, self.outputs = block * MAPS + map, count, outputs
        self.first = width * part // parts
        self.numbers = width * (part + 1) // parts - self.first
        self.layer, self.map = 0, 0
        self.at, self.end, self.lines = 0, 0, 0
        if self.layers > 0:
            var each = step.rank_room * self.numbers * (1 if step.narrow != 0 else 2) // LINE + 1
            self.lines = (self.layers * count * each + records - 1) // records

    @always_inline
    def next(mut self):
        for _ in range(self.lines):
            if self.at >= self.end and not self.find():
                return
            prefetch(Bytes(unsafe_from_address=self.at))
            self.at += LINE

    @always_inline
    def find(mut self) -> Bool:
        """Goes on to the next layer and map that has a line of the share."""
        while self.layer < self.layers:
            comptime Record = Pointer[Factors, MutUntrackedOrigin]
            var table = Record(unsafe_from_address=self.tables.unsafe_offset(self.layer)[])
            ref factors = table.unsafe_offset(self.record + self.map)[]
            self.map += 1
            if self.map == self.count:
                self.layer, self.map = self.layer + 1, 0
            var bytes = factors.rank * factors.kind
            self.at = Int(factors.B if self.outputs else factors.A) + self.first * bytes
            self.end = self.at + self.numbers * bytes
            if self.at < self.end:
                return True
        return False


@always_inline
def ask(at: Bytes, first: Int, end: Int):
    """Asks for the cache lines that begin in a range of bytes."""
    for byte in range((first + LINE - 1) // LINE * LINE, end, LINE):
        prefetch(at.unsafe_offset(byte))


@always_inline
def linear(
    step: Step,
    matrix: Matrix,
    inputs: Inputs,
    unit: Int,
    block: Int,
    map: Int,
    slot: Int,
    y: Floats,
    stride: Int,
    mut coming: Coming,
):
    """32 outputs of a linear map with its layers, for every row.

    What the layers add is asked for while the model's own product makes the first 16 outputs, and what comes afterwards
    while it makes the others.
    """
    var units = matrix.groups // UNIT
    var added = Coming(step, block, map, 1, True, matrix.groups * GROUP, unit, units, matrix.blocks)
    multiply(matrix, unit * UNIT, inputs, step.rows, y, stride, added)
    multiply(matrix, unit * UNIT + 1, inputs, step.rows, y, stride, coming)
    for layer in range(step.layers):
        var factors = factors_of(step, layer, block, map)
        if factors.rank == 0:
            continue
        var pair = Int(step.layer_pairs.unsafe_offset(layer)[])
        var u = step.u.unsafe_offset((slot * step.pairs + pair) * step.rank_room)
        var number = Int(step.layer_counts.unsafe_offset(layer)[])
        expand(factors, unit * UNIT, u, step.rank_room, step.pair_rows.unsafe_offset(pair), number, y, stride)


def project(step: Step, work: Work, phase: Int, block: Int, layer: Layer):
    """Queries, keys and values."""
    var q_units, k_units = layer.q.groups // UNIT, layer.k.groups // UNIT
    var units = q_units + 2 * k_units
    var length = share(work, units, step.rows)
    var pieces = (units + length - 1) // length
    while True:
        var first = work.take(phase, pieces)
        if first < 0:
            break
        first *= length
        for unit in range(first, min(first + length, units)):
            ask_for_places(step, block, unit, units)
            var coming = Coming(step, block, 3, 1, False, layer.o.blocks * BLOCK, unit, units, layer.q.blocks)
            if unit < q_units:
                linear(step, layer.q, step.inputs, unit, block, 0, 0, step.q, layer.q.groups * GROUP, coming)
            elif unit < q_units + k_units:
                var at = unit - q_units
                linear(step, layer.k, step.inputs, at, block, 1, 1, step.k, layer.k.groups * GROUP, coming)
            else:
                var at = unit - q_units - k_units
                linear(step, layer.v, step.inputs, at, block, 2, 2, step.v, layer.k.groups * GROUP, coming)
        work.done(phase)
    work.wait(phase, pieces)


@always_inline
def key_place(step: Step, block: Int, head: Int, row: Int) -> Halves:
    """The block of the cache where the key of a row goes."""
    ref model = step.model[]
    var number = Int(step.slots.unsafe_offset(row)[]) // BLOCK
    var at = (block * model.kv_heads + head) * step.cache_blocks + number
    return step.keys.unsafe_offset(at * BLOCK * model.head_dim)


@always_inline
def ask_for_places(step: Step, block: Int, part: Int, parts: Int):
    """Asks for a share of the places where the keys of a block will go: each of their numbers has a line of its own."""
    ref model = step.model[]
    if step.rows != step.chunks:
        return  # rows of a prompt follow one another in the same lines
    var total = step.rows * model.kv_heads
    for piece in range(total * part // parts, total * (part + 1) // parts):
        var place = key_place(step, block, piece % model.kv_heads, piece // model.kv_heads)
        ask(Bytes(unsafe_from_address=Int(place)), 0, BLOCK * model.head_dim * 2)


def place(step: Step, work: Work, phase: Int, block: Int, layer: Layer):
    """Rotates queries and keys, and puts keys and values into the cache."""
    ref model = step.model[]
    var size = model.head_dim
    var queries = model.heads // model.kv_heads
    var epsilon = Float32(model.epsilon)
    var total = step.rows * model.kv_heads
    var length = max(1, total // (work.threads() * PIECES))
    var pieces = (total + length - 1) // length
    while True:
        var first = work.take(phase, pieces)
        if first < 0:
            break
        first *= length
        for piece in range(first, min(first + length, total)):
            var row, head = piece // model.kv_heads, piece % model.kv_heads
            var position = Int(step.positions.unsafe_offset(row)[])
            var cos = model.cos.unsafe_offset(position * model.half)
            var sin = model.sin.unsafe_offset(position * model.half)
            for q in range(head * queries, (head + 1) * queries):
                var query = step.q.unsafe_offset(row * layer.q.groups * GROUP + q * size)
                if model.qk_norm != 0:
                    rms_norm(query, layer.q_norm, size, epsilon, query, size)
                rotate(query, cos, sin, model.half)
            var key = step.k.unsafe_offset(row * layer.k.groups * GROUP + head * size)
            if model.qk_norm != 0:
                rms_norm(key, layer.k_norm, size, epsilon, key, size)
            rotate(key, cos, sin, model.half)
            var value = step.v.unsafe_offset(row * layer.k.groups * GROUP + head * size)
            var slot = Int(step.slots.unsafe_offset(row)[])
            store_key(key_place(step, block, head, row), slot % BLOCK, key, size)
            var at = ((block * model.kv_heads + head) * step.cache_blocks + slot // BLOCK) * BLOCK * size
            store_value(step.values.unsafe_offset(at), slot % BLOCK, value, size)
        work.done(phase)
    work.wait(phase, pieces)


@always_inline
def spans_of(step: Step, chunk: Int, queries: Int, span: Int) -> Int:
    """Into how many spans the queries that share a key head are split, in one chunk."""
    return (Int(step.chunk_counts.unsafe_offset(chunk)[]) * queries + span - 1) // span


def look_back(step: Step, work: Work, phase: Int, block: Int, layer: Layer):
    """Attention of every row over its own sequence."""
    ref model = step.model[]
    var queries = model.heads // model.kv_heads
    var span, pieces = step.span, step.spans
    var chunk, before = 0, 0
    while True:
        var piece = work.take(phase, pieces)
        if piece < 0:
            break
        while piece >= before + spans_of(step, chunk, queries, span) * model.kv_heads:
            before += spans_of(step, chunk, queries, span) * model.kv_heads
            chunk += 1
        var total = Int(step.chunk_counts.unsafe_offset(chunk)[]) * queries
        var spans = spans_of(step, chunk, queries, span)
        var head, first = (piece - before) // spans, (piece - before) % spans * span
        var at = (block * model.kv_heads + head) * step.cache_blocks * BLOCK * model.head_dim
        var table = Table(unsafe_from_address=step.chunk_tables.unsafe_offset(chunk)[])
        var cache = Cache(step.keys.unsafe_offset(at), step.values.unsafe_offset(at), table, model.head_dim)
        var query, end = first, min(first + span, total)
        while query + MOST_QUERIES <= end:
            attend_tile[MOST_QUERIES](step, layer, cache, chunk, head, query, work.thread)
            query += MOST_QUERIES
        while query < end:
            attend_tile[1](step, layer, cache, chunk, head, query, work.thread)
            query += 1
        work.done(phase)
    work.wait(phase, pieces)


@always_inline
def attend_tile[Q: Int](step: Step, layer: Layer, cache: Cache, chunk: Int, head: Int, first: Int, thread: Int):
    ref model = step.model[]
    var per_row = model.heads // model.kv_heads
    var queries = Array[Floats, Q](fill=step.q)
    var targets = Array[Floats, Q](fill=step.mixed)
    var lengths = Array[Int, Q](fill=0)
    comptime for q in range(Q):
        var row = (first + q) // per_row
        var offset = (head * per_row + (first + q) % per_row) * model.head_dim
        var absolute = Int(step.chunk_rows.unsafe_offset(chunk)[]) + row
        queries[q] = step.q.unsafe_offset(absolute * layer.q.groups * GROUP + offset)
        targets[q] = step.mixed.unsafe_offset(absolute * layer.o.blocks * BLOCK + offset)
        lengths[q] = Int(step.chunk_starts.unsafe_offset(chunk)[]) + row + 1
    var scores = step.scores.unsafe_offset(thread * MOST_QUERIES * step.score_room)
    attend[Q](cache, queries, lengths, targets, Float32(model.scale), scores, step.score_room)


def add_outputs(step: Step, work: Work, phase: Int, block: Int, matrix: Matrix, inputs: Inputs, map: Int, y: Floats):
    """Adds a linear map with its layers to x; y is scratch."""
    var units = matrix.groups // UNIT
    var stride = matrix.groups * GROUP
    var length = share(work, units, step.rows)
    var pieces = (units + length - 1) // length
    while True:
        var first = work.take(phase, pieces)
        if first < 0:
            break
        first *= length
        for unit in range(first, min(first + length, units)):
            var next, first_map, count = (block, 4, 2) if map == 3 else (block + 1, 0, 3)
            var coming = Coming(step, next, first_map, count, False, stride, unit, units, matrix.blocks)
            linear(step, matrix, inputs, unit, block, map, 0, y, stride, coming)
            for row in range(step.rows):
                var at = row * stride + unit * BLOCK
                add(step.x.unsafe_offset(at), y.unsafe_offset(at), BLOCK)
        work.done(phase)
    work.wait(phase, pieces)


def feed_forward(step: Step, work: Work, phase: Int, block: Int, layer: Layer):
    """The gated half of a block: silu(gate) * up, with its quantised form."""
    var units = layer.gate.groups // UNIT
    var stride = layer.gate.groups * GROUP
    var length = share(work, units, step.rows)
    var pieces = (units + length - 1) // length
    while True:
        var first = work.take(phase, pieces)
        if first < 0:
            break
        first *= length
        for unit in range(first, min(first + length, units)):
            var width = layer.down.blocks * BLOCK
            var coming = Coming(step, block, 6, 1, False, width, unit, units, 2 * layer.gate.blocks)
            linear(step, layer.gate, step.inputs, unit, block, 4, 0, step.gate, stride, coming)
            linear(step, layer.up, step.inputs, unit, block, 5, 1, step.up, stride, coming)
            for row in range(step.rows):
                var at = row * stride + unit * BLOCK
                gated(step.gate.unsafe_offset(at), step.up.unsafe_offset(at), BLOCK)
                var place = place_of(step.rows, units, row, unit)
                quantise_block(step.gate.unsafe_offset(at), place, step.inner, layer.down.kind != Q8 or step.narrow != 0, layer.down.kind == Q8)
        work.done(phase)
    work.wait(phase, pieces)


def normalise(step: Step, work: Work, phase: Int, weight: Floats, stride: Int, want8: Bool, want16: Bool):
    """Normalises x into h, with its quantised form, row by row."""
    ref model = step.model[]
    var total = step.rows
    var length = max(1, total // (work.threads() * PIECES))
    var pieces = (total + length - 1) // length
    while True:
        var first = work.take(phase, pieces)
        if first < 0:
            break
        first *= length
        for row in range(first, min(first + length, total)):
            var h = step.h.unsafe_offset(row * stride)
            rms_norm(step.x.unsafe_offset(row * stride), weight, model.hidden, Float32(model.epsilon), h, stride)
            quantise(h, step.rows, row, stride // BLOCK, step.inputs, want8, want16)
        work.done(phase)
    work.wait(phase, pieces)


def quantise_rows(step: Step, work: Work, phase: Int, x: Floats, blocks: Int, want8: Bool, want16: Bool):
    """The quantised form of x [rows, 32 * blocks]."""
    var total = step.rows
    var length = max(1, total // (work.threads() * PIECES))
    var pieces = (total + length - 1) // length
    while True:
        var first = work.take(phase, pieces)
        if first < 0:
            break
        first *= length
        for row in range(first, min(first + length, total)):
            quantise(x.unsafe_offset(row * blocks * BLOCK), step.rows, row, blocks, step.inputs, want8, want16)
        work.done(phase)
    work.wait(phase, pieces)


def embed(step: Step, work: Work, phase: Int, stride: Int):
    var total = step.rows
    var length = max(1, total // (work.threads() * PIECES))
    var pieces = (total + length - 1) // length
    while True:
        var first = work.take(phase, pieces)
        if first < 0:
            break
        first *= length
        for row in range(first, min(first + length, total)):
            element(step.model[].embedding, Int(step.tokens.unsafe_offset(row)[]), step.x.unsafe_offset(row * stride))
        work.done(phase)
    work.wait(phase, pieces)


def finish(step: Step, work: Work, phase: Int, stride: Int):
    """The normalised rows whose logits are wanted."""
    ref model = step.model[]
    var pieces = step.wanted
    while True:
        var index = work.take(phase, pieces)
        if index < 0:
            break
        var row = Int(step.wanted_rows.unsafe_offset(index)[])
        var h = step.h.unsafe_offset(index * stride)
        rms_norm(step.x.unsafe_offset(row * stride), model.output_norm, model.hidden, Float32(model.epsilon), h, stride)
        quantise(h, step.wanted, index, stride // BLOCK, step.inputs, model.output.kind != Q8, model.output.kind == Q8)
        work.done(phase)
    work.wait(phase, pieces)


def predict(step: Step, work: Work, phase: Int):
    """Logits."""
    ref model = step.model[]
    var units = model.output.groups // UNIT
    var length = max(1, units // (work.threads() * 8))
    var pieces = (units + length - 1) // length
    while True:
        var first = work.take(phase, pieces)
        if first < 0:
            break
        first *= length
        var nothing = Nothing()
        for group in range(first * UNIT, min(first + length, units) * UNIT):
            multiply(model.output, group, step.inputs, step.wanted, step.logits, model.output.groups * GROUP, nothing)
        work.done(phase)
    work.wait(phase, pieces)


def choose(step: Step, work: Work, phase: Int):
    """The next token of every wanted row."""
    ref model = step.model[]
    var pieces = step.wanted
    while True:
        var index = work.take(phase, pieces)
        if index < 0:
            break
        var logits = step.logits.unsafe_offset(index * model.output.groups * GROUP)
        ref choice = step.choices.unsafe_offset(index)[]
        var finite = is_finite(logits, model.vocab)
        var token = UNDECIDED
        if finite and choice.temperature >= 0:
            var room = room_at(step.choice_rooms.unsafe_offset(work.thread * step.choice_room), model.vocab)
            token = choose_token(logits, model.vocab, choice, room)
        step.chosen.unsafe_offset(index)[] = Int32(token)
        step.finite.unsafe_offset(index)[] = Int32(1) if finite else Int32(0)
        work.done(phase)
    work.wait(phase, pieces)


def map_rows(step: Step, work: Work):
    """One linear map: x [rows, 32 * blocks] -> h [rows, 16 * groups]."""
    ref matrix = step.matrix
    quantise_rows(step, work, 0, step.x, matrix.blocks, matrix.kind != Q8, matrix.kind == Q8)
    var pieces = matrix.groups
    while True:
        var group = work.take(1, pieces)
        if group < 0:
            break
        var nothing = Nothing()
        multiply(matrix, group, step.inputs, step.rows, step.h, matrix.groups * GROUP, nothing)
        work.done(1)
    work.wait(1, pieces)


def run(step: Step, work: Work):
    """All phases of a task, as one of the pool's threads."""
    if step.task == ONE_MAP:
        map_rows(step, work)
        return
    ref model = step.model[]
    var width = model.embedding.blocks * BLOCK
    var phase = 0
    embed(step, work, phase, width)
    for block in range(model.blocks):
        ref layer = model.layers.unsafe_offset(block)[]
        var attention8 = step.narrow != 0 or layer.q.kind != Q8 or layer.k.kind != Q8 or layer.v.kind != Q8
        var attention16 = layer.q.kind == Q8 or layer.k.kind == Q8 or layer.v.kind == Q8
        normalise(step, work, phase + 1, layer.attention_norm, width, attention8, attention16)
        if step.layers > 0:
            shrink_all(step, work, phase + 2, block, 0, 3, step.h, step.inputs, width)
        project(step, work, phase + 3, block, layer)
        place(step, work, phase + 4, block, layer)
        look_back(step, work, phase + 5, block, layer)
        var mixed8 = step.narrow != 0 or layer.o.kind != Q8
        quantise_rows(step, work, phase + 6, step.mixed, layer.o.blocks, mixed8, layer.o.kind == Q8)
        if step.layers > 0:
            shrink_all(step, work, phase + 7, block, 3, 1, step.mixed, step.inputs, layer.o.blocks * BLOCK)
        add_outputs(step, work, phase + 8, block, layer.o, step.inputs, 3, step.h)
        var ffn8 = step.narrow != 0 or layer.gate.kind != Q8 or layer.up.kind != Q8
        var ffn16 = layer.gate.kind == Q8 or layer.up.kind == Q8
        normalise(step, work, phase + 9, layer.ffn_norm, width, ffn8, ffn16)
        if step.layers > 0:
            shrink_all(step, work, phase + 10, block, 4, 2, step.h, step.inputs, width)
        feed_forward(step, work, phase + 11, block, layer)
        if step.layers > 0:
            shrink_all(step, work, phase + 12, block, 6, 1, step.gate, step.inner, layer.down.blocks * BLOCK)
        add_outputs(step, work, phase + 13, block, layer.down, step.inner, 6, step.h)
        phase += PHASES
    if step.wanted > 0:
        finish(step, work, phase + 1, width)
        predict(step, work, phase + 2)
        choose(step, work, phase + 3)


@export("engine_abi_version")
def engine_abi_version() abi("C") -> Int:
    return ABI_VERSION


@export("engine_struct_size")
def engine_struct_size(number: Int) abi("C") -> Int:
    """The size of each structure, in the order of `native.structs.STRUCTS`."""
    if number == 0:
        return size_of[Matrix]()
    if number == 1:
        return size_of[Inputs]()
    if number == 2:
        return size_of[Layer]()
    if number == 3:
        return size_of[Model]()
    if number == 4:
        return size_of[Pool]()
    if number == 5:
        return size_of[Step]()
    return size_of[Choice]() if number == 6 else 0


@export("engine_choice_room")
def engine_choice_room(vocab: Int) abi("C") -> Int:
    """Bytes of scratch memory that a thread needs to choose a token."""
    return room_bytes(vocab)


@export("engine_choose")
def engine_choose(logits: Int, vocab: Int, choice: Pointer[Choice, MutUntrackedOrigin], room: Int) abi("C") -> Int:
    """The next token of one row of finite logits, or UNDECIDED."""
    return choose_token(
        Floats(unsafe_from_address=logits), vocab, choice[], room_at(Bytes(unsafe_from_address=room), vocab)
    )


@export("engine_cpu_features")
def engine_cpu_features() abi("C") -> Int:
    """What the CPU must have, as bits of `synapse.kernels.cpu.FEATURES`."""
    var features = 0
    comptime if CompilationTarget.has_avx2():
        features |= 1
    comptime if CompilationTarget.has_avx512f() and CompilationTarget.has_vnni():
        features |= 2
    comptime if CompilationTarget.has_neon_int8_dotprod():
        features |= 4
    comptime if CompilationTarget.has_avx512f():
        features |= 8
    return features


def plan_attention(mut step: Step):
    """Splits attention into pieces. It looks at the chunks, which a thread without a piece may not."""
    if step.task != WHOLE:
        return
    ref model = step.model[]
    step.span = MANY_QUERIES
    if step.rows * model.heads < 24 * step.pool[].threads:
        step.span = 1
    elif step.rows == step.chunks:
        step.span = MOST_QUERIES
    step.spans = 0
    for chunk in range(step.chunks):
        step.spans += spans_of(step, chunk, model.heads // model.kv_heads, step.span) * model.kv_heads


@export("engine_step")
def engine_step(step: Pointer[Step, MutUntrackedOrigin]) abi("C") -> Int:
    """Computes a step with the calling thread, and with those of `engine_serve` as far as they come."""
    var mine = step[].copy()
    plan_attention(mine)
    ref pool = mine.pool[]
    begin_job(pool)
    Pointer[Step, MutUntrackedOrigin](unsafe_from_address=pool.step)[] = mine.copy()
    run(mine, Work(mine.pool, announce_job(pool), 0))
    return 0


@export("engine_serve")
def engine_serve(address: Pointer[Pool, MutUntrackedOrigin], thread: Int) abi("C") -> Int:
    """Helps with every step until `engine_stop`, as thread `thread` (1 …) of the pool."""
    ref pool = address[]
    var job = Int32(0)
    while True:
        job = wait_for_job(pool, job)
        if look(pool.stop) != 0:
            return 0
        var step = Pointer[Step, MutUntrackedOrigin](unsafe_from_address=pool.step)[].copy()
        if is_current(pool, job):  # otherwise another job began meanwhile, and the copy may be half of each
            run(step, Work(address, job, thread))


@export("engine_stop")
def engine_stop(address: Pointer[Pool, MutUntrackedOrigin]) abi("C") -> Int:
    """Sends the threads of `engine_serve` home."""
    ref pool = address[]
    begin_job(pool)
    _ = Atomic[Int32].fetch_add(pool.stop, Int32(1))
    _ = announce_job(pool)
    return 0
