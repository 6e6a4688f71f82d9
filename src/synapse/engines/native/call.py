"""What the kernel `engine` is given: the fields of `engine_model.mojo`'s structs, and the arrays they point to."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synapse.engines.cache.blocks import BLOCK_TOKENS
from synapse.engines.choice import Choice
from synapse.engines.native.cache import HalfCache
from synapse.engines.native.layers import GROUP, PackedLayer
from synapse.engines.native.packed.file import PackedModel
from synapse.engines.native.structs import ChoiceFields, Inputs, Layer, Matrix, Model, Pool, Step
from synapse.engines.reference.transformer import Chunk, StepLogits
from synapse.kernels.structs import address
from synapse.models.config import PROJECTIONS
from synapse.models.gguf_file import PARTS

BLOCK = 32
QUERIES = 3
"""Queries that share a look at the cache: `MOST_QUERIES` of engine_attention.mojo."""
WHOLE, ONE_MAP = 0, 1
"""What a step is to do."""
PHASES = 13
OTHER_PHASES = 4
SLEEP_NANOSECONDS = 1_000_000
"""How long a thread sleeps at most before it looks again whether a phase is over."""
KINDS = {"q4": 4, "q4_0": 5, "q8": 8}
LINE = 64
"""Bytes that cores hand over at once: each flag has its own."""
LANES = 8
"""Numbers of a register in attention: heads have a multiple of them."""


def padded(number: int) -> int:
    """The next multiple of 32."""
    return -(-number // BLOCK) * BLOCK


class ModelTable:
    """The `Model` struct of a packed model, with everything it points to."""

    def __init__(self, tensors: PackedModel, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
        """A table that stays good for as long as the model is open.

        Args:
            cos, sin: of the angles of the rotary embedding, [context, dimensions / 2].
        """
        config = tensors.config
        self.config = config
        self._keep: list[object] = [tensors, cos, sin]
        layers = (Layer * config.blocks)(*(self._block(tensors, index) for index in range(config.blocks)))
        self._keep.append(layers)
        output = "token_embd.weight" if config.tied else "output.weight"
        self._model = Model(
            *(config.blocks, config.hidden, config.heads, config.kv_heads, config.head_dim),
            *(cos.shape[1], config.vocab, config.qk_norm, config.norm_eps, config.head_dim**-0.5),
            *(address(cos), address(sin), self._vector(tensors, "output_norm.weight")),
            *(self._matrix(tensors, "token_embd.weight", None), self._matrix(tensors, output, None)),
            ctypes.addressof(layers),
        )
        self.address = ctypes.addressof(self._model)

    def _block(self, tensors: PackedModel, index: int) -> Layer:
        config = self.config
        name = {part: f"blk.{index}.{gguf}" for part, gguf in PARTS.items()}
        norms = [self._vector(tensors, name[part]) for part in ("attention_norm", "ffn_norm")]
        norms += [self._vector(tensors, name[part]) if config.qk_norm else 0 for part in ("q_norm", "k_norm")]
        maps = []
        for projection in PROJECTIONS:
            biased = config.qkv_bias and projection in ("q_proj", "k_proj", "v_proj")
            maps.append(self._matrix(tensors, name[projection], name[f"{projection[0]}_bias"] if biased else None))
        return Layer(*norms, *maps)

    def _vector(self, tensors: PackedModel, name: str) -> int:
        array = np.ascontiguousarray(tensors.array(name), np.float32)
        self._keep.append(array)
        return address(array)

    def _matrix(self, tensors: PackedModel, name: str, bias: str | None) -> Matrix:
        out, width = tensors.shape(name)
        vector = 0
        if bias is not None:
            array = np.zeros(padded(out), np.float32)
            array[:out] = tensors.array(bias)
            self._keep.append(array)
            vector = address(array)
        records = tensors.array(name)
        self._keep.append(records)
        return matrix(records, tensors.kind(name), (out, width), vector)


def matrix(records: NDArray[Any], kind: str, shape: tuple[int, int], bias: int) -> Matrix:
    """A packed matrix [out, in] with its bias at this address, 0 for none."""
    out, width = shape
    return Matrix(address(records), KINDS[kind], padded(out) // GROUP, padded(width) // BLOCK, bias, int(bias != 0))


class Team:
    """The threads that compute steps, and what they share. One of them is whoever calls `run`."""

    def __init__(self, library: ctypes.CDLL, threads: int, blocks: int, keep: object = None) -> None:
        """Start the threads.

        Args:
            blocks: transformer blocks of the largest job.
            keep: what a late thread may look at between two jobs; it lives as long as the threads.
        """
        self.threads = threads
        self.library = library
        self._keep = keep
        flags = np.zeros((4, LINE // 4), np.int32)
        step = Step()
        phases = np.zeros((OTHER_PHASES + PHASES * blocks, LINE // 8), np.int64)
        lines = [address(flags) + LINE * line for line in range(len(flags))]
        limit = np.array([0, SLEEP_NANOSECONDS], np.int64)
        pool = Pool(threads, *lines, address(limit), ctypes.addressof(step), address(phases))
        self._shared = (pool, flags, limit, step, phases)
        self.address = ctypes.addressof(pool)
        helpers: list[threading.Thread] = []
        self._go_home = weakref.finalize(self, _stop, library, self.address, helpers)
        for number in range(1, threads):  # the system may refuse one: then those before it go home with this object
            helper = threading.Thread(target=_serve, args=(library, self._shared, number), daemon=True)
            helper.start()
            helpers.append(helper)

    def run(self, step: Step) -> None:
        """Compute a step."""
        self.library.engine_step(ctypes.addressof(step))

    def close(self) -> None:
        """Send the threads home and wait until they are."""
        self._go_home()


def _serve(library: ctypes.CDLL, shared: tuple[Any, ...], number: int) -> None:
    """A helper's life. It holds on to what the threads share."""
    library.engine_serve(ctypes.addressof(shared[0]), number)


def _stop(library: ctypes.CDLL, pool: int, helpers: list[threading.Thread]) -> None:
    if helpers:
        library.engine_stop(pool)
        for helper in helpers:
            helper.join()


@dataclass(slots=True)
class _Batch:
    """The rows of a step that use one layer."""

    layer: PackedLayer
    rows: list[int]
    weights: list[float]


class Workspace:
    """The scratch memory of steps: made once for so many rows, and again only when a step has more."""

    def __init__(self, table: ModelTable, team: Team) -> None:
        self._table = table
        self._team = team
        self._rows = self._wanted = self._pairs = self._scores = -1
        self._arrays: dict[str, NDArray[Any]] = {}
        self._step = Step(task=WHOLE, model=table.address, pool=team.address)
        self._choices = (ChoiceFields * 0)()
        self._step.choice_room = team.library.engine_choice_room(table.config.vocab)
        self._choice_rooms = np.zeros(team.threads * self._step.choice_room, np.uint8)
        self._step.choice_rooms = address(self._choice_rooms)

    def compute(self, chunks: Sequence[Chunk], cache: HalfCache) -> StepLogits:
        """Run the kernel on these chunks. The result is valid until the next call."""
        config = self._table.config
        rows = sum(len(chunk.tokens) for chunk in chunks)
        wanted = sum(chunk.wanted for chunk in chunks)
        longest = max(chunk.end for chunk in chunks)
        batches, pairs = _by_layer(chunks)
        rank = max((batch.layer.rank for batch in batches), default=0)
        narrow = any(batch.layer.narrow for batch in batches)
        self._make_room(rows, wanted, pairs * rank, padded(longest))

        counts = [len(chunk.tokens) for chunk in chunks]
        starts = [chunk.start for chunk in chunks]
        if rows == len(chunks):
            positions = np.array(starts, np.int32)
            slots = np.array([_slot(chunk) for chunk in chunks], np.int32)
        else:
            positions = np.concatenate([np.arange(c.start, c.end, dtype=np.int32) for c in chunks])
            slots = np.concatenate([chunk.slots() for chunk in chunks]).astype(np.int32)
        tokens = np.concatenate([chunk.tokens for chunk in chunks]).astype(np.int32)
        firsts = np.cumsum([0, *counts[:-1]])
        tables = [chunk.table.astype(np.int32) for chunk in chunks]
        described = np.array([firsts, counts, starts], np.int32)
        wanted_rows = np.concatenate(
            [np.arange(f + n - c.wanted, f + n, dtype=np.int32) for f, n, c in zip(firsts, counts, chunks, strict=True)]
        )
        addresses = np.array([address(table) for table in tables], np.int64)
        layer_tables = np.array([batch.layer.address for batch in batches], np.int64)
        sizes = [len(batch.rows) for batch in batches]
        layer_spans = np.array([np.cumsum([0, *sizes])[:-1], sizes], np.int32)
        pair_rows = np.array([row for batch in batches for row in batch.rows], np.int32)
        pair_weights = np.array([weight for batch in batches for weight in batch.weights], np.float32)
        a, step = self._arrays, self._step
        step.rows, step.chunks, step.wanted = rows, len(chunks), wanted
        step.layers, step.narrow, step.pairs, step.rank_room = len(batches), narrow, pairs, rank
        step.cache_blocks, step.score_room = cache.blocks, padded(longest)
        step.tokens, step.positions, step.slots = address(tokens), address(positions), address(slots)
        step.chunk_rows, step.chunk_counts, step.chunk_starts = (address(numbers) for numbers in described)
        step.chunk_tables, step.wanted_rows = address(addresses), address(wanted_rows)
        step.layer_tables = address(layer_tables)
        step.pair_rows, step.pair_weights = address(pair_rows), address(pair_weights)
        step.layer_pairs, step.layer_counts = (address(numbers) for numbers in layer_spans)
        step.keys, step.values = address(cache.keys), address(cache.values)
        row = 0
        for chunk in chunks:
            for place in range(chunk.wanted):
                self._choices[row] = choice_fields(chunk.choices[place]) if chunk.choices else NO_CHOICE
                row += 1
        self._team.run(step)
        return StepLogits(
            a["logits"][:wanted, : config.vocab],
            a["finite"][:wanted] != 0,
            a["chosen"][:wanted].copy(),
        )

    @property
    def bytes(self) -> int:
        """Memory of the scratch arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def _make_room(self, rows: int, wanted: int, ranks: int, longest: int) -> None:
        if rows <= self._rows and wanted <= self._wanted and ranks <= self._pairs and longest <= self._scores:
            return
        config, a = self._table.config, self._arrays
        hidden, inner, vocab = padded(config.hidden), padded(config.intermediate), padded(config.vocab)
        heads, kv = padded(config.heads * config.head_dim), padded(config.kv_heads * config.head_dim)
        if rows > self._rows:
            self._rows = max(rows, 16)
            r, widest = self._rows, max(hidden, heads)
            a |= {name: np.zeros((r, hidden), np.float32) for name in ("x", "h")}
            a |= {name: np.zeros((r, heads), np.float32) for name in ("q", "mixed")}
            a |= {name: np.zeros((r, kv), np.float32) for name in ("k", "v")}
            a |= {name: np.zeros((r, inner), np.float32) for name in ("gate", "up")}
            for which, width in (("", widest), ("inner_", inner)):
                a[f"{which}codes8"] = np.zeros((r, width), np.int8)
                a[f"{which}codes16"] = np.zeros((r, width), np.int16)
                a |= {
                    f"{which}{name}": np.zeros((r, width // BLOCK), np.float32)
                    for name in ("scale8", "sum8", "scale16")
                }
        if wanted > self._wanted:
            self._wanted = max(wanted, 1)
            a["logits"] = np.zeros((self._wanted, vocab), np.float32)
            a["chosen"] = np.zeros(self._wanted, np.int32)
            self._choices = (ChoiceFields * self._wanted)()
            self._step.choices = ctypes.addressof(self._choices)
            a["finite"] = np.zeros(self._wanted, np.int32)
        if ranks > self._pairs:
            self._pairs = max(ranks, 1)
            a["u"] = np.zeros((3, self._pairs), np.float32)
        if longest > self._scores:
            self._scores = max(longest, 256)
            a["scores"] = np.zeros((self._team.threads, QUERIES, self._scores), np.float32)
        for name in SCRATCH:
            setattr(self._step, name, address(a[name]))
        self._step.inputs = Inputs(*(address(a[name]) for name in INPUTS))
        self._step.inner = Inputs(*(address(a[f"inner_{name}"]) for name in INPUTS))


INPUTS = ("codes8", "scale8", "sum8", "codes16", "scale16")
SCRATCH = (
    *("x", "h", "q", "k", "v", "mixed", "gate", "up", "u", "scores"),
    *("logits", "chosen", "finite"),
)
"""The scratch arrays that `Step` names."""


NO_CHOICE = ChoiceFields(temperature=-1.0)


def choice_fields(choice: Choice) -> ChoiceFields:
    """A choice as the kernel reads it; its arrays must outlive the step."""
    edits, mask = choice.edits, choice.mask
    pointers = () if edits is None else (len(edits.tokens), *(address(array) for array in edits))
    fields = ChoiceFields(choice.temperature, choice.top_p, choice.min_p, choice.uniform, choice.top_k, *pointers)
    if mask is not None:
        fields.mask = address(mask)
    return fields


def _by_layer(chunks: Sequence[Chunk]) -> tuple[list[_Batch], int]:
    """The rows of each layer, and how many pairs of a row and a layer there are."""
    batches: dict[str, _Batch] = {}
    row = pairs = 0
    for chunk in chunks:
        count = len(chunk.tokens)
        for layer, weight in chunk.stack:
            assert isinstance(layer, PackedLayer)  # noqa: S101 (the transformer that packs layers made them all)
            batch = batches.setdefault(layer.id, _Batch(layer, [], []))
            batch.rows += range(row, row + count)
            batch.weights += [weight] * count
            pairs += count
        row += count
    # By id, not as they come: the sums of a row with several layers keep their order in any company.
    return sorted(batches.values(), key=lambda batch: batch.layer.id), pairs


def _slot(chunk: Chunk) -> int:
    """Where in the cache the only token of a chunk goes."""
    return int(chunk.table[chunk.start // BLOCK_TOKENS]) * BLOCK_TOKENS + chunk.start % BLOCK_TOKENS
