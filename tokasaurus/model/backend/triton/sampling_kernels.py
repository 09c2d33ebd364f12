"""The kernels of sampling, in Triton. A program does a row, and nothing beside the row matters.

``model/sampling/sampler.py`` defines the results. The weight of a token has the same bits as in
``backend/cpu/sampling.cpp``: the same operations, none of which may be fused with another (they are
compiled with ``enable_fp_fusion=False``). Sums are in float64 in another order. So both draw the
same token, unless the random number lies within about 1e-16 of a boundary.
"""

import triton
import triton.language as tl

__all__ = ["draw_token", "mask_row", "sum_row"]

LEAST = tl.constexpr(float("-inf"))
# No id, and no rank, is as high.
NO_ID = tl.constexpr(0x7FFFFFFF)
# A token whose score is further below the best one has weight 0.
WIDEST = tl.constexpr(104.0)


@triton.jit(do_not_specialize=["bits_stride"], do_not_specialize_on_alignment=["rows", "bits"])
def mask_row(
    masked,  # [rows, SIZE], written
    logits,  # [rows, SIZE], before adjustments
    rows,  # [masks] int64
    bits,  # [masks, bytes] uint8, lowest bit first
    stride,  # of rows of masked
    logits_stride,
    bits_stride,
    IS_ADJUSTED: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Takes the tokens that are not allowed out of a row.

    Where no token is left, adjustments have forbidden all that are allowed: these get their logits
    of before.
    """
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number)
    allowed = bits + number * bits_stride
    best = tl.full((), LEAST, tl.float32)
    for start in range(0, SIZE, TILE):
        ids = start + tl.arange(0, TILE)
        there = masked + row * stride + ids
        is_allowed = (ids < SIZE) & _has_bit(allowed, ids, SIZE)
        values = tl.load(there, mask=is_allowed, other=LEAST)
        best = tl.maximum(best, tl.max(values.to(tl.float32), axis=0))
        tl.store(there, values, mask=ids < SIZE)
    if IS_ADJUSTED and best == LEAST:
        for start in range(0, SIZE, TILE):
            ids = start + tl.arange(0, TILE)
            is_allowed = (ids < SIZE) & _has_bit(allowed, ids, SIZE)
            values = tl.load(logits + row * logits_stride + ids, mask=is_allowed, other=LEAST)
            tl.store(masked + row * stride + ids, values, mask=ids < SIZE)


@triton.jit
def _has_bit(bits, ids, SIZE: tl.constexpr):
    return ((tl.load(bits + ids // 8, mask=ids < SIZE, other=0) >> (ids % 8)) & 1) != 0


@triton.jit
def draw_token(
    logits,  # [rows, SIZE]
    draws,  # [rows, 8] int32: DRAW in base.py
    tokens,  # [rows] int64, written
    stride,  # of rows of logits
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Draws a token for each row."""
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * stride
    draw = draws + number * 8
    temperature = tl.load(draw + 4).to(tl.float32, bitcast=True)
    top_k = tl.load(draw + 5)
    top_p = tl.load(draw + 6).to(tl.float32, bitcast=True)
    log_min_p = tl.load(draw + 7).to(tl.float32, bitcast=True)
    best_logit, first_id, nan_id = _best(row, SIZE, TILE)
    if temperature == 0.0:
        # If numbers have diverged, the first that is not a number.
        tl.store(tokens + number, tl.where(nan_id == NO_ID, first_id, nan_id).to(tl.int64))
    elif (nan_id != NO_ID) | (tl.abs(best_logit) == float("inf")):
        tl.store(tokens + number, (number * 0 + SIZE - 1).to(tl.int64))
    else:
        best = tl.div_rn(best_logit, temperature)
        floor = best + log_min_p
        last_rank, last_id = tl.full((), -NO_ID - 1, tl.int32), tl.full((), NO_ID, tl.int32)
        is_limited = (top_k > 0) & (top_k < SIZE)
        if is_limited:
            last_rank, last_id = _last_kept(
                row, best_logit, temperature, best, top_k, 0.0, last_rank, last_id, True, SIZE, TILE
            )
        if top_p < 1.0:
            total = _weight(row, temperature, best, LEAST, last_rank, last_id, SIZE, TILE)
            share = top_p.to(tl.float64) * total
            last_rank, last_id = _last_kept(
                row, best_logit, temperature, best, 0, share, last_rank, last_id, False, SIZE, TILE
            )
        total = _weight(row, temperature, best, floor, last_rank, last_id, SIZE, TILE)
        target = _reachable(_uniform(draw) * total, total)
        token = _token_at(
            row, temperature, best, floor, last_rank, last_id, target, first_id, SIZE, TILE
        )
        tl.store(tokens + number, token.to(tl.int64))


@triton.jit(do_not_specialize_on_alignment=["index", "temperatures", "token_ids"])
def sum_row(
    logits,  # [rows, SIZE]
    index,  # [programs] int64
    temperatures,  # [programs] fp32
    token_ids,  # [programs] int64; not read without COUNTS
    norms,  # [programs] fp32, written
    num_higher,  # [programs] int64, written with COUNTS
    stride,  # of rows of logits
    COUNTS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The logarithm of the sum of e^score, and the number of tokens with higher scores."""
    number = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(index + number) * stride
    temperature = tl.load(temperatures + number)
    best_logit, _, nan_id = _best(row, SIZE, TILE)
    best = tl.div_rn(best_logit, temperature)
    total = _weight(row, temperature, best, LEAST, -NO_ID - 1, NO_ID, SIZE, TILE)
    norm = (best.to(tl.float64) + tl.log(total)).to(tl.float32)
    if (nan_id == NO_ID) & (tl.abs(best) == float("inf")):
        norm = best
    tl.store(norms + number, norm)
    if COUNTS:
        picked = tl.load(row + tl.load(token_ids + number)).to(tl.float32)
        picked = tl.div_rn(picked, temperature)
        count = tl.full((), 0, tl.int32)
        for first in range(0, SIZE, TILE):
            scores = tl.div_rn(_logits(row, first, SIZE, TILE), temperature)
            count += tl.sum((scores > picked).to(tl.int32))
        tl.store(num_higher + number, count.to(tl.int64))


# --- of a tile -----------------------------------------------------------------------------------


@triton.jit
def _logits(row, first, SIZE: tl.constexpr, TILE: tl.constexpr):
    """[TILE] fp32; -infinity beyond the vocabulary."""
    ids = first + tl.arange(0, TILE)
    return tl.load(row + ids, mask=ids < SIZE, other=LEAST).to(tl.float32)


@triton.jit
def _ranks(logits):
    """int32 numbers that are ordered like the logits. Adding 0 makes -0.0 equal to 0.0."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & NO_ID)


@triton.jit
def _exponential_below_0(x):
    """e^x for x up to 0, within 1 unit of the last place; 0 below -87."""
    shifted = x * 1.44269504088896341 + 12582912.0  # 1.5 * 2^23: the addition rounds
    n = shifted - 12582912.0
    r = (x - n * 0.693145751953125) - n * 1.428606765330187e-06
    q = r * (1.0 / 5040) + (1.0 / 720)
    q = q * r + (1.0 / 120)
    q = q * r + (1.0 / 24)
    q = q * r + (1.0 / 6)
    q = q * r + 0.5
    # 1 is added last, so that one rounding decides.
    p = (r * r) * q + r + 1.0
    # The low bits of `shifted` are n.
    scale = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, p * scale)


@triton.jit
def _weights(logits, ids, temperature, best, floor, last_rank, last_id):
    """[TILE] float64: relative to that of the best token; 0 for tokens that are removed."""
    scores = tl.div_rn(logits, temperature)
    ranks = _ranks(logits)
    is_removed = (ranks < last_rank) | ((ranks == last_rank) & (ids > last_id)) | (scores < floor)
    return tl.where(is_removed, 0.0, _exponential_below_0(scores - best)).to(tl.float64)


# --- of a row ------------------------------------------------------------------------------------


@triton.jit
def _best(row, SIZE: tl.constexpr, TILE: tl.constexpr):
    """The highest logit, the first token that has it, and the first that is not a number."""
    best = tl.full((), LEAST, tl.float32)
    first_id, nan_id = tl.full((), 0, tl.int32), tl.full((), NO_ID, tl.int32)
    for first in range(0, SIZE, TILE):
        ids = first + tl.arange(0, TILE)
        logits = _logits(row, first, SIZE, TILE)
        is_nan = logits != logits
        nan_id = tl.minimum(nan_id, tl.min(tl.where(is_nan, ids, NO_ID)))
        numbers = tl.where(is_nan, LEAST, logits)
        highest = tl.max(numbers)
        at = tl.min(tl.where(numbers == highest, ids, NO_ID))
        first_id = tl.where(highest > best, at, first_id)
        best = tl.maximum(best, highest)
    return best, first_id, nan_id


@triton.jit
def _weight(
    row, temperature, best, floor, last_rank, last_id, SIZE: tl.constexpr, TILE: tl.constexpr
):
    """The weight of all tokens that are kept."""
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, SIZE, TILE):
        ids = first + tl.arange(0, TILE)
        logits = _logits(row, first, SIZE, TILE)
        total += tl.sum(_weights(logits, ids, temperature, best, floor, last_rank, last_id))
    return total


@triton.jit
def _token_at(
    row,
    temperature,
    best,
    floor,
    last_rank,
    last_id,
    target,
    otherwise,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The token whose weight lifts the cumulative weight beyond the target, from id to id.

    ``_weight`` adds up in the same order, so it is there; ``otherwise`` stands for none.
    """
    before = tl.full((), 0.0, tl.float64)
    token = tl.full((), NO_ID, tl.int32)
    first = tl.full((), 0, tl.int32)
    while (token == NO_ID) & (first < SIZE):
        ids = first + tl.arange(0, TILE)
        logits = _logits(row, first, SIZE, TILE)
        weights = _weights(logits, ids, temperature, best, floor, last_rank, last_id)
        behind = before + tl.sum(weights)
        if behind > target:
            cumulative = before + tl.cumsum(weights, axis=0)
            token = tl.min(tl.where((cumulative > target) & (weights > 0.0), ids, NO_ID))
            # The sum may be a last bit above the last cumulative one.
            last = tl.max(tl.where(weights > 0.0, ids, -1))
            token = tl.where(token == NO_ID, last, token)
        before = behind
        first += TILE
    return tl.where(token == NO_ID, otherwise, token)


@triton.jit
def _last_kept(
    row,
    best_logit,
    temperature,
    best,
    most,
    share,
    last_rank,
    last_id,
    BY_COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first token of the ranking at which it is enough to go so far: its rank and its id.

    It is enough if so many tokens are kept, or if they hold a share of the weight. All tokens with
    a weight are kept if they are not enough. Tokens that are removed already count as nothing.
    """
    # The token's rank is one of those from `low` to `high`. The ones above `high` are not enough.
    least = tl.maximum(best_logit - WIDEST * temperature, -3.4028234663852886e38)
    low, high = _ranks(least).to(tl.int64), _ranks(best_logit).to(tl.int64)
    num_above, above = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    # The first step looks at all of them.
    middle = low - 1
    found = tl.full((), 0, tl.int32)
    while found == 0:
        count, weight = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
        lowest, highest = tl.full((), NO_ID, tl.int32), tl.full((), -NO_ID - 1, tl.int32)
        for first in range(0, SIZE, TILE):
            ids = first + tl.arange(0, TILE)
            logits = _logits(row, first, SIZE, TILE)
            ranks = _ranks(logits)
            is_there = (ranks >= low) & (ranks <= high) & (ids < SIZE)
            is_above = is_there & (ranks > middle)
            if BY_COUNT:
                count += tl.sum(is_above.to(tl.int32))
            else:
                weights = _weights(logits, ids, temperature, best, LEAST, last_rank, last_id)
                weight += tl.sum(tl.where(is_above, weights, 0.0))
            lowest = tl.minimum(lowest, tl.min(tl.where(is_above, ranks, NO_ID)))
            highest = tl.maximum(
                highest, tl.max(tl.where(is_there & (ranks <= middle), ranks, -NO_ID - 1))
            )
        if BY_COUNT:
            is_enough = num_above + count >= most
        else:
            is_enough = above + weight >= share
        if is_enough:
            low = lowest.to(tl.int64)
        elif middle < low:
            found += 2
        else:
            num_above += count
            above += weight
            high = highest.to(tl.int64)
        middle = low + (high - low) // 2
        if low == high:
            found += 1
    if found == 1:
        # Of tokens with this rank, the first ones are kept.
        needed = tl.full((), NO_ID, tl.int32)
        if BY_COUNT:
            needed = most - num_above
        last_id = _enough_equal(
            row,
            low,
            needed,
            above,
            share,
            temperature,
            best,
            last_rank,
            last_id,
            BY_COUNT,
            SIZE,
            TILE,
        )
        last_rank = low.to(tl.int32)
    return last_rank, last_id


@triton.jit
def _enough_equal(
    row,
    rank,
    needed,
    above,
    share,
    temperature,
    best,
    last_rank,
    last_id,
    BY_COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The id of the token of this rank at which it is enough."""
    seen = tl.full((), 0, tl.int32)
    token = tl.full((), NO_ID, tl.int32)
    first = tl.full((), 0, tl.int32)
    while (token == NO_ID) & (first < SIZE):
        ids = first + tl.arange(0, TILE)
        logits = _logits(row, first, SIZE, TILE)
        is_equal = (_ranks(logits) == rank) & (ids < SIZE)
        counts = seen + tl.cumsum(is_equal.to(tl.int32), axis=0)
        if BY_COUNT:
            is_enough = counts >= needed
        else:
            # All have the same weight, except for those that are removed.
            weights = _weights(logits, ids, temperature, best, LEAST, last_rank, last_id)
            is_enough = above + counts.to(tl.float64) * weights >= share
        token = tl.min(tl.where(is_equal & is_enough, ids, NO_ID))
        seen += tl.sum(is_equal.to(tl.int32))
        first += TILE
    # Of those that top_k removed, none is kept.
    if rank == last_rank:
        token = tl.minimum(token, last_id)
    return token


@triton.jit
def _reachable(target, total):
    """Rounding may have lifted the target to the total, and nothing is above that."""
    below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
    return tl.minimum(target, below)


@triton.jit
def _uniform(draw):
    """The random number of ``model/sampling/randomness.py``."""
    key0 = tl.load(draw).to(tl.uint32, bitcast=True)
    key1 = tl.load(draw + 1).to(tl.uint32, bitcast=True)
    count0 = tl.load(draw + 2).to(tl.uint32, bitcast=True)
    count1 = tl.load(draw + 3).to(tl.uint32, bitcast=True)
    count2, count3 = count0 * 0, count0 * 0
    for _ in tl.static_range(10):
        product0 = count0.to(tl.uint64) * 0xD2511F53
        product1 = count2.to(tl.uint64) * 0xCD9E8D57
        count0 = (product1 >> 32).to(tl.uint32) ^ count1 ^ key0
        count1 = product1.to(tl.uint32)
        count2 = (product0 >> 32).to(tl.uint32) ^ count3 ^ key1
        count3 = product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    bits = ((count0.to(tl.uint64) << 32) | count1.to(tl.uint64)) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16
