"""Choosing the next token of a row of logits: what `synapse.engines.sampling.Sampler.choose` says, in a few microseconds.

Weights exp((logit - highest) / temperature) are float64, and differ from NumPy's by less than MARGIN. A choice that could
come out otherwise within that margin is not made: UNDECIDED hands the row to the reference, so that both always agree.

Sums over the whole vocabulary are made of float32 weights first, which are off by less than ROUGH (`Rough` has the proof).
Where the choice is clear within that, it is made; otherwise the sums are made again in float64, about four times as slow.
"""

from std.bit import count_trailing_zeros
from std.math import fma, log
from std.memory import bitcast, pack_bits

from engine_matrix import Bytes, Floats

comptime W = 8
comptime Lane = SIMD[DType.float32, W]
comptime Weight = SIMD[DType.float64, W]
comptime Doubles = Pointer[Float64, MutUntrackedOrigin]
comptime Keys = Pointer[Int64, MutUntrackedOrigin]
comptime Tokens = Pointer[Int32, MutUntrackedOrigin]

comptime UNDECIDED = -1
comptime MARGIN = 1e-11  # of a sum of weights
comptime PART = 256  # tokens whose weights are summed up: the draw looks into one part
comptime SMALL = 32  # tokens of which the highest logit is noted, for top-k
comptime COLDEST = 1e-30  # below this temperature, differences overflow
comptime FAINTEST = Float64(-700)  # exponent from which a weight counts as zero
comptime LOG2_E = 1.4426950408889634
comptime LN_2 = 0.6931471805599453
comptime LN_2_REST = 2.3190468138462996e-17
comptime ROUNDER = 6755399441055744.0  # 1.5 · 2^52: adding it leaves the nearest whole number in the low bits
comptime ROUGH = 1.0 / 2097152  # 2^-21: of a sum of rough weights
comptime ROUGH_MARGIN = 2.1 * ROUGH  # of the distance between a draw and a border, as a share of the sum
comptime ROUGH_REACH = 4096.0  # logits over temperature, as powers of two, up to which rough weights are that good
comptime ROUGH_FAINTEST = 80.0  # powers of two below the highest at which rough weights end
comptime ROUGH_ROUNDER = Float32(12582912)  # 1.5 · 2^23
comptime ROUGH_TERMS = 8
comptime POWERS_OF_LN_2 = SIMD[DType.float32, 8](
    1.0,
    0.69314718055994531,
    0.24022650695910071,
    0.055504108664821580,
    0.0096181291076284772,
    0.0013333558146428443,
    0.00015403530393381609,
    0.000015252733804059841,
)  # over factorials
comptime TERMS = 13
comptime INVERSE_FACTORIALS = SIMD[DType.float64, 16](
    1.0, 1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320, 1 / 362880, 1 / 3628800, 1 / 39916800, 1 / 479001600, 0, 0, 0
)


@fieldwise_init
struct Choice(Copyable, Movable):
    """How a token is to be chosen; `structs.py` has the same fields. Edited are the logits of so many tokens:
    (logit + bias) divided by the factor if above zero, else multiplied with it, and then less `less`.
    """

    var temperature: Float64  # 0 greedy, below 0 not at all
    var top_p: Float64
    var min_p: Float64
    var uniform: Float64  # the draw, from [0, 1)
    var top_k: Int  # 0 for all
    var edits: Int
    var edit_tokens: Tokens
    var edit_bias: Floats
    var edit_factor: Floats
    var edit_less: Floats
    var mask: Bytes  # a bit for each token that is allowed, or null


@fieldwise_init
struct Room(Copyable, Movable):
    """A thread's scratch memory."""

    var row: Floats  # [vocab]: edited logits
    var parts: Doubles  # [vocab / PART]: sums of weights
    var peaks: Floats  # [vocab / SMALL], twice
    var keys: Keys  # [vocab] each: candidates in the order of their ids,
    var weights: Doubles
    var ranked_keys: Keys  # and as far as needed in that of their logits
    var ranked_weights: Doubles


def room_bytes(vocab: Int) -> Int:
    """How much scratch memory a thread needs."""
    var tokens = (vocab + PART - 1) // PART * PART
    return tokens * (4 + 4 * 8) + tokens // PART * 8 + 2 * (tokens // SMALL) * 4


def room_at(start: Bytes, vocab: Int) -> Room:
    var tokens = (vocab + PART - 1) // PART * PART
    var at = Int(start)
    var keys, weights = at, at + 8 * tokens
    var ranked_keys, ranked_weights = at + 16 * tokens, at + 24 * tokens
    var parts = at + 32 * tokens
    var row = parts + tokens // PART * 8
    return Room(
        Floats(unsafe_from_address=row),
        Doubles(unsafe_from_address=parts),
        Floats(unsafe_from_address=row + 4 * tokens),
        Keys(unsafe_from_address=keys),
        Doubles(unsafe_from_address=weights),
        Keys(unsafe_from_address=ranked_keys),
        Doubles(unsafe_from_address=ranked_weights),
    )


@always_inline
def weigh(exponent: Weight) -> Weight:
    """The exponential of numbers up to 0; exactly 1 of 0, and 0 where it would be less than 1e-304."""
    var x = max(exponent, Weight(FAINTEST))
    var rounded = fma(x, Weight(LOG2_E), Weight(ROUNDER))
    var whole = rounded - ROUNDER
    var rest = fma(whole, Weight(-LN_2), x)
    rest = fma(whole, Weight(-LN_2_REST), rest)
    var sum = Weight(INVERSE_FACTORIALS[TERMS - 1])
    comptime for i in range(1, TERMS):
        sum = fma(sum, rest, Weight(INVERSE_FACTORIALS[TERMS - 1 - i]))
    var power = bitcast[DType.int64, W](rounded) << 52
    var result = bitcast[DType.float64, W](bitcast[DType.int64, W](sum) + power)
    return exponent.lt(FAINTEST).select(Weight(0), result)


@fieldwise_init
struct Rough(Copyable, Movable, ImplicitlyCopyable):
    """Weights in float32: 2^(c logit - shift), with c = log2(e) / temperature and a whole shift that cancels out.

    With u = 2^-24 and |c logit| up to 4096 + 80, a weight is off by less than 3.1 u of itself:
    - c is the sum of `factor` and `rest` but for u^2 of it: 4176 u^2 in the exponent, which is nothing here.
    - The whole part n is c logit rounded, so that |factor logit - n| <= 1/2 and `fma` rounds it by at most u / 4; adding
      rest logit, of at most 4176 u, rounds by at most u / 2. Together 0.75 u in the exponent, 0.53 u in the weight.
    - The series ends with ln(2)^7 / 7!: 0.347^8 / 8! · 2^0.501 is 0.13 u, of a weight of at least 2^-0.501 0.18 u.
    - Its rounded coefficients: u (2^0.501 - 1) / 2^-0.501 = 0.59 u. Each step of it rounds by u of what it has, which
      later steps multiply with up to 1/2: u for the last and 0.7 u for all others.
    Pairs of pairs of pairs of weights add 3 u, and float64 sums nothing: a sum is off by less than ROUGH = 8 u of itself.
    Logits below `lowest` count as that: with 2^-79 of the highest each, which no vocabulary makes ROUGH of a sum.

    A draw uniform · total and a border, a sum of the first weights, are then off by less than ROUGH · total each.
    """

    var factor: Float32
    var rest: Float32
    var lowest: Float32
    var shift: Int32
    var unit: Float64  # times this, a weight is a share of the highest

    @staticmethod
    def of(highest: Float32, temperature: Float64) -> Self:
        var c = LOG2_E / temperature
        var factor = Float32(c)
        var rounded = fma(highest, factor, ROUGH_ROUNDER)
        var unit = weigh(Weight((Float64(rounded - ROUGH_ROUNDER) - Float64(highest) * c) * LN_2))[0]
        var lowest = Float32(Float64(highest) - ROUGH_FAINTEST / c)
        return Self(factor, Float32(c - Float64(factor)), lowest, bitcast[DType.int32, 1](rounded), unit)

    @staticmethod
    def reaches(highest: Float32, temperature: Float64) -> Bool:
        """Whether these logits are in the range of the proof."""
        return abs(Float64(highest)) * LOG2_E / temperature <= ROUGH_REACH

    @always_inline
    def weigh(self, logits: Lane) -> Lane:
        var x = max(logits, Lane(self.lowest))
        var rounded = fma(x, Lane(self.factor), Lane(ROUGH_ROUNDER))
        var rest = fma(x, Lane(self.factor), ROUGH_ROUNDER - rounded)
        rest = fma(x, Lane(self.rest), rest)
        var sum = Lane(POWERS_OF_LN_2[ROUGH_TERMS - 1])
        comptime for i in range(1, ROUGH_TERMS):
            sum = fma(sum, rest, Lane(POWERS_OF_LN_2[ROUGH_TERMS - 1 - i]))
        var power = (bitcast[DType.int32, W](rounded) - self.shift) << 23
        return bitcast[DType.float32, W](bitcast[DType.int32, W](sum) + power)

    @always_inline
    def sum(self, row: Floats, first: Int, end: Int) -> Float64:
        """The weights of a range of tokens."""
        var sums = Weight(0)
        var at = first
        while at + 8 * W <= end:
            var weights = Array[Lane, 8](fill=Lane(0))
            comptime for i in range(8):
                weights[i] = self.weigh(row.unsafe_offset(at + W * i).unsafe_load[width=W]())
            var left = (weights[0] + weights[1]) + (weights[2] + weights[3])
            var right = (weights[4] + weights[5]) + (weights[6] + weights[7])
            sums += (left + right).cast[DType.float64]()
            at += 8 * W
        while at < end:
            sums += self.weigh(load(row, at, end)).cast[DType.float64]()
            at += W
        return sums.reduce_add()


@always_inline
def load(logits: Floats, at: Int, vocab: Int) -> Lane:
    """Eight logits; minus infinity past the end."""
    if at + W <= vocab:
        return logits.unsafe_offset(at).unsafe_load[width=W]()
    var v = Lane(Float32.MIN)
    for i in range(vocab - at):
        v[i] = logits.unsafe_offset(at + i)[]
    return v


def is_finite(logits: Floats, vocab: Int) -> Bool:
    var odd = Lane(0)
    var at = 0
    while at + W <= vocab:
        var v = logits.unsafe_offset(at).unsafe_load[width=W]()
        odd += v - v
        at += W
    while at < vocab:
        odd[0] += logits.unsafe_offset(at)[] - logits.unsafe_offset(at)[]
        at += 1
    var trouble = odd.reduce_add()
    return trouble == trouble


def edit(logits: Floats, vocab: Int, choice: Choice, row: Floats):
    """Bias, penalties and grammar. The steps go through memory one after the other: each is rounded as in NumPy."""
    for at in range(0, vocab, W):
        row.unsafe_offset(at).unsafe_store(load(logits, at, vocab))
    for i in range(choice.edits):
        var at = row.unsafe_offset(Int(choice.edit_tokens.unsafe_offset(i)[]))
        var biased = at[] + choice.edit_bias.unsafe_offset(i)[]
        var factor = choice.edit_factor.unsafe_offset(i)[]
        at[] = biased / factor if biased > 0 else biased * factor
    for i in range(choice.edits):
        var at = row.unsafe_offset(Int(choice.edit_tokens.unsafe_offset(i)[]))
        at[] = max(-Float32.MAX_FINITE, min(Float32.MAX_FINITE, at[] - choice.edit_less.unsafe_offset(i)[]))
    if Int(choice.mask) == 0:
        return
    comptime bits = SIMD[DType.uint8, W](1, 2, 4, 8, 16, 32, 64, 128)
    for at in range(0, vocab, W):
        var allowed = (bits & choice.mask.unsafe_offset(at // 8)[]).ne(0)
        var here = row.unsafe_offset(at)
        here.unsafe_store(allowed.select(here.unsafe_load[width=W](), Lane(Float32.MIN)))


@always_inline
def key_of(logit: Float32, token: Int) -> Int64:
    """A number that is larger the larger the logit is, and the smaller the token where logits are equal."""
    var bits = bitcast[DType.int32, 1](logit + 0)  # minus zero becomes zero
    var order = Int64(bits if bits >= 0 else bits ^ 0x7FFF_FFFF)
    return order << 32 | Int64(0x7FFF_FFFF - token)


@always_inline
def token_of(key: Int64) -> Int:
    return 0x7FFF_FFFF - Int(key & 0xFFFF_FFFF)


def rank_peak(logits: Floats, vocab: Int, k: Int, peaks: Floats) -> Float32:
    """A logit that at least k tokens reach: the k-th highest of the highest of each SMALL tokens, where there are so many."""
    var count = (vocab + SMALL - 1) // SMALL
    if k > count:
        return Float32.MIN
    for i in range(count):
        var highest = Lane(Float32.MIN)
        for at in range(i * SMALL, min((i + 1) * SMALL, vocab), W):
            highest = max(highest, load(logits, at, vocab))
        peaks.unsafe_offset(i)[] = highest.reduce_max()
    var low, high = 0, count  # the k-th highest is in this range (Hoare's quickselect)
    while high - low > 1:
        var pivot = peaks.unsafe_offset((low + high) // 2)[]
        var i, j = low, high - 1
        while i <= j:
            while peaks.unsafe_offset(i)[] > pivot:
                i += 1
            while peaks.unsafe_offset(j)[] < pivot:
                j -= 1
            if i <= j:
                var other = peaks.unsafe_offset(i)[]
                peaks.unsafe_offset(i)[] = peaks.unsafe_offset(j)[]
                peaks.unsafe_offset(j)[] = other
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j + 1
        elif k - 1 >= i:
            low = i
        else:
            return pivot
    return peaks.unsafe_offset(low)[]


def keep_first(keys: Keys, weights: Doubles, count: Int, most: Int, mass: Float64, margin: Float64) -> Int:
    """Moves to the front those that come first by key: at most `most`, and each only while the weights before it are below
    `mass`. Returns how many those are, or UNDECIDED.
    """
    var low, high = 0, count  # those before `low` are kept, those from `high` on are not
    var before = Float64(0)
    while low < high:
        var middle, last = (low + high) // 2, high - 1
        var pivot, pivot_weight = keys.unsafe_offset(middle)[], weights.unsafe_offset(middle)[]
        keys.unsafe_offset(middle)[] = keys.unsafe_offset(last)[]
        weights.unsafe_offset(middle)[] = weights.unsafe_offset(last)[]
        var place, above = low, Float64(0)
        for i in range(low, last):
            var key = keys.unsafe_offset(i)[]
            if key > pivot:
                var weight = weights.unsafe_offset(i)[]
                above += weight
                keys.unsafe_offset(i)[] = keys.unsafe_offset(place)[]
                weights.unsafe_offset(i)[] = weights.unsafe_offset(place)[]
                keys.unsafe_offset(place)[] = key
                weights.unsafe_offset(place)[] = weight
                place += 1
        keys.unsafe_offset(last)[] = keys.unsafe_offset(place)[]
        weights.unsafe_offset(last)[] = weights.unsafe_offset(place)[]
        keys.unsafe_offset(place)[] = pivot
        weights.unsafe_offset(place)[] = pivot_weight
        if place > 0 and place < most and abs(before + above - mass) <= margin:
            return UNDECIDED
        if place < most and (place == 0 or before + above < mass):
            before += above + pivot_weight
            low = place + 1
        else:
            high = place
    return low


def choose_token(logits: Floats, vocab: Int, choice: Choice, room: Room) -> Int:
    """The token, or UNDECIDED. All logits are finite."""
    var row = logits
    if choice.edits > 0 or Int(choice.mask) != 0:
        edit(logits, vocab, choice, room.row)
        row = room.row
    var peaks = Lane(Float32.MIN)
    for at in range(0, vocab, W):
        peaks = max(peaks, load(row, at, vocab))
    var highest = peaks.reduce_max()
    if not (highest - highest == 0) or (choice.temperature > 0 and choice.temperature < COLDEST):
        return UNDECIDED
    if choice.temperature == 0:
        for at in range(0, vocab, W):
            var hits = Int(pack_bits(load(row, at, vocab).eq(highest)))
            if hits != 0:
                return at + Int(count_trailing_zeros(hits))
    var top_k = choice.top_k if choice.top_k < vocab else 0
    if top_k > 0 or choice.top_p < 1 or choice.min_p > 0:
        return draw_of_kept(row, vocab, highest, top_k, choice, room)
    if Rough.reaches(highest, choice.temperature):
        var token = draw_roughly(row, vocab, highest, choice, room)
        if token != UNDECIDED:
            return token
    return draw_of_all(row, vocab, highest, choice, room)


def draw_roughly(row: Floats, vocab: Int, highest: Float32, choice: Choice, room: Room) -> Int:
    """`draw_of_all` with rough weights."""
    var rough = Rough.of(highest, choice.temperature)
    var total = Float64(0)
    for part in range((vocab + PART - 1) // PART):
        room.parts.unsafe_offset(part)[] = rough.sum(row, part * PART, min((part + 1) * PART, vocab))
        total += room.parts.unsafe_offset(part)[]
    var target, margin = choice.uniform * total, ROUGH_MARGIN * total
    var before = Float64(0)
    var part = part_of(target, before, vocab, room)
    for at in range(part * PART, min((part + 1) * PART, vocab), W):
        var weights = rough.weigh(load(row, at, vocab)).cast[DType.float64]()
        for i in range(min(W, vocab - at)):
            if target < before + weights[i]:
                return at + i if is_clear(target, before, before + weights[i], margin) else UNDECIDED
            before += weights[i]
    return UNDECIDED


@always_inline
def part_of(target: Float64, mut before: Float64, vocab: Int, room: Room) -> Int:
    """The part in which a draw lies; `before` becomes the weight of those before it."""
    var part = 0
    while part < (vocab - 1) // PART and before + room.parts.unsafe_offset(part)[] <= target:
        before += room.parts.unsafe_offset(part)[]
        part += 1
    return part


@always_inline
def weights_at(row: Floats, at: Int, vocab: Int, highest: Float64, inverse: Float64) -> Weight:
    return weigh((load(row, at, vocab).cast[DType.float64]() - highest) * inverse)


def draw_of_all(row: Floats, vocab: Int, highest: Float32, choice: Choice, room: Room) -> Int:
    """A token drawn by its weight, from all."""
    var peak, inverse = Float64(highest), 1 / choice.temperature
    var total = Float64(0)
    for part in range((vocab + PART - 1) // PART):
        var sum = Weight(0)
        for at in range(part * PART, min((part + 1) * PART, vocab), W):
            sum += weights_at(row, at, vocab, peak, inverse)
        room.parts.unsafe_offset(part)[] = sum.reduce_add()
        total += room.parts.unsafe_offset(part)[]
    var target, margin = choice.uniform * total, MARGIN * total
    var before = Float64(0)
    var part = part_of(target, before, vocab, room)
    for at in range(part * PART, min((part + 1) * PART, vocab), W):
        var weights = weights_at(row, at, vocab, peak, inverse)
        for i in range(min(W, vocab - at)):
            if target < before + weights[i]:
                return at + i if is_clear(target, before, before + weights[i], margin) else UNDECIDED
            before += weights[i]
    return UNDECIDED


@always_inline
def is_clear(target: Float64, start: Float64, end: Float64, margin: Float64) -> Bool:
    """Whether a draw is that far inside a token's share."""
    return target - start > margin and end - target > margin


def sum_of_all(row: Floats, vocab: Int, highest: Float32, choice: Choice) -> Float64:
    """The weights of the whole vocabulary."""
    var sum = Weight(0)
    for at in range(0, vocab, W):
        sum += weights_at(row, at, vocab, Float64(highest), 1 / choice.temperature)
    return sum.reduce_add()


def draw_of_kept(row: Floats, vocab: Int, highest: Float32, top_k: Int, choice: Choice, room: Room) -> Int:
    """A token drawn by its weight, from those that top-k, top-p and min-p keep."""
    var peak, inverse = Float64(highest), 1 / choice.temperature
    var all_count = choice.top_p < 1 and top_k == 0  # whether the sum over the vocabulary is needed
    var rough = all_count and Rough.reaches(highest, choice.temperature)
    var total = Float64(0)
    if rough:
        var scale = Rough.of(highest, choice.temperature)
        total = scale.sum(row, 0, vocab) * scale.unit
    elif all_count:
        total = sum_of_all(row, vocab, highest, choice)
    # Tokens below `least` are not kept: those of less than a vocabulary's share of 1 - top_p together have less than that.
    var least = choice.min_p
    if choice.top_p < 1:
        least = max(least, (1 - choice.top_p) * max(total, 1) / Float64(vocab))
    var faintest = log(least * (1 - 1e-5)) if least > 1e-300 else FAINTEST
    var lowest_logit = Float32((peak + faintest * choice.temperature) - 1e-6 * (abs(peak) - faintest * choice.temperature))
    if top_k > 0:
        lowest_logit = max(lowest_logit, rank_peak(row, vocab, top_k, room.peaks))
    var count = 0
    for at in range(0, vocab, W):
        var logits = load(row, at, vocab)
        var hits = Int(pack_bits(logits.ge(lowest_logit)))
        while hits != 0:
            var i = Int(count_trailing_zeros(hits))
            hits &= hits - 1
            if at + i < vocab:
                room.keys.unsafe_offset(count)[] = key_of(logits[i], at + i)
                room.weights.unsafe_offset(count)[] = Float64(logits[i])
                count += 1
    for at in range(0, count, W):  # past the last there is room for eight
        var logits = room.weights.unsafe_offset(at)
        logits.unsafe_store(weigh((logits.unsafe_load[width=W]() - peak) * inverse))
    var lowest = Int64.MIN  # key of the last that is kept
    if top_k > 0 or choice.top_p < 1:
        var ranked = count
        for i in range(count):
            room.ranked_keys.unsafe_offset(i)[] = room.keys.unsafe_offset(i)[]
            room.ranked_weights.unsafe_offset(i)[] = room.weights.unsafe_offset(i)[]
        if top_k > 0:
            ranked = keep_first(room.ranked_keys, room.ranked_weights, ranked, top_k, Float64.MAX, 0)
            for i in range(ranked):
                total += room.ranked_weights.unsafe_offset(i)[]
        if choice.top_p < 1:
            var among, share = ranked, ROUGH_MARGIN if rough else MARGIN
            ranked = keep_first(room.ranked_keys, room.ranked_weights, among, among, choice.top_p * total, share * total)
            if ranked == UNDECIDED and rough:
                total = sum_of_all(row, vocab, highest, choice)
                ranked = keep_first(room.ranked_keys, room.ranked_weights, among, among, choice.top_p * total, MARGIN * total)
            if ranked == UNDECIDED:
                return UNDECIDED
        lowest = Int64.MAX
        for i in range(ranked):
            lowest = min(lowest, room.ranked_keys.unsafe_offset(i)[])
    var kept = 0
    total = 0
    for i in range(count):
        var weight = room.weights.unsafe_offset(i)[]
        if room.keys.unsafe_offset(i)[] < lowest or weight < choice.min_p - MARGIN:
            continue
        if weight < 1 and abs(weight - choice.min_p) <= MARGIN:
            return UNDECIDED
        room.keys.unsafe_offset(kept)[] = room.keys.unsafe_offset(i)[]
        room.weights.unsafe_offset(kept)[] = weight
        total += weight
        kept += 1
    var target, margin = choice.uniform * total, MARGIN * total
    var before = Float64(0)
    for i in range(kept):
        var end = before + room.weights.unsafe_offset(i)[]
        if target < end:
            # A token that alone is kept needs no margin: whatever is drawn, it is the one.
            var clear = kept == 1 or is_clear(target, before, end, margin)
            return token_of(room.keys.unsafe_offset(i)[]) if clear else UNDECIDED
        before = end
    return UNDECIDED
