"""The kernels of attention, in Triton.

They are functions of what their arguments hold, and of shapes that an engine never changes. Batches
differ in data only, so no batch compiles anything.

``planning.py`` says what a task is, ``backend.py`` what the arguments are.
"""

import triton
import triton.language as tl

__all__ = ["attend_task", "merge_partials", "prepare_heads"]

NEVER_SEEN = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_E4M3 = tl.constexpr(448.0)
PROPAGATE_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["num_rows", "page_table_stride"])
def prepare_heads(
    heads,  # [rows, heads + 2 * kv_heads, head_dim]
    cosines,  # [rows, head_dim / 2] fp32
    sines,
    query_norm,  # [head_dim]; not read without HAS_NORMS
    key_norm,
    query,  # [rows, heads, head_dim], written
    keys,  # of one layer of the cache, written
    values,
    page_table,  # [slots, columns] int32
    row_slots,  # [rows] int32
    row_positions,
    num_rows,
    row_stride,  # of heads
    page_table_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Norms and rotates heads. Writes queries, and keys and values into their page.

    A program does some heads of the whole batch, counted row by row.
    """
    ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    number = tl.program_id(0).to(tl.int64) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    is_head = number < num_rows.to(tl.int64) * ALL_HEADS
    row, head = tl.where(is_head, number // ALL_HEADS, 0), number % ALL_HEADS
    half: tl.constexpr = HEAD_DIM // 2
    d = tl.arange(0, BLOCK_HALF)
    is_number = is_head[:, None] & (d < half)[None, :]
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS

    at = heads + (row * row_stride + head * HEAD_DIM)[:, None] + d[None, :]
    left = tl.load(at, mask=is_number, other=0.0)
    right = tl.load(at + half, mask=is_number, other=0.0)
    dtype = left.dtype
    first, second = left.to(tl.float32), right.to(tl.float32)
    if HAS_NORMS:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = 1.0 / tl.sqrt(squares / HEAD_DIM + eps)
        weight_at = tl.where(is_query[:, None], query_norm + d[None, :], key_norm + d[None, :])
        first_weight = tl.load(weight_at, mask=is_number, other=0.0).to(tl.float32)
        second_weight = tl.load(weight_at + half, mask=is_number, other=0.0).to(tl.float32)
        # The quotient is rounded before it is multiplied by the weight, and the product again.
        first = (first_weight * (first * scale[:, None]).to(dtype).to(tl.float32)).to(dtype)
        second = (second_weight * (second * scale[:, None]).to(dtype).to(tl.float32)).to(dtype)
        first, second = first.to(tl.float32), second.to(tl.float32)
    of_angles = row[:, None] * half + d[None, :]
    cos = tl.load(cosines + of_angles, mask=is_number, other=0.0)
    sin = tl.load(sines + of_angles, mask=is_number, other=0.0)
    new_left = tl.where(is_value[:, None], left, (first * cos - second * sin).to(dtype))
    new_right = tl.where(is_value[:, None], right, (second * cos + first * sin).to(dtype))

    to_query = query + ((row * NUM_HEADS + head) * HEAD_DIM)[:, None] + d[None, :]
    tl.store(to_query, new_left, mask=is_number & is_query[:, None])
    tl.store(to_query + half, new_right, mask=is_number & is_query[:, None])

    # Rows that fill a batch up have no position: nothing is written for them.
    slot = tl.load(row_slots + row).to(tl.int64)
    position = tl.load(row_positions + row)
    is_number = is_number & (position >= 0)[:, None]
    position = tl.maximum(position, 0)
    page = tl.load(page_table + slot * page_table_stride + position // PAGE_SIZE).to(tl.int64)
    kv_head = tl.where(is_value, head - NUM_HEADS - NUM_KV_HEADS, head - NUM_HEADS)
    place = (page * NUM_KV_HEADS + kv_head) * PAGE_SIZE + position % PAGE_SIZE
    in_page = place[:, None] * HEAD_DIM + d[None, :]
    is_key = is_number & (head >= NUM_HEADS)[:, None] & (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
    if keys.dtype.element_ty == tl.float8e4nv:
        # What is larger than the largest number becomes it. NaN stays NaN.
        new_left = tl.clamp(new_left.to(tl.float32), -LARGEST_E4M3, LARGEST_E4M3, PROPAGATE_NAN)
        new_right = tl.clamp(new_right.to(tl.float32), -LARGEST_E4M3, LARGEST_E4M3, PROPAGATE_NAN)
    new_left, new_right = (
        new_left.to(keys.dtype.element_ty),
        new_right.to(keys.dtype.element_ty),
    )
    tl.store(keys + in_page, new_left, mask=is_key)
    tl.store(keys + in_page + half, new_right, mask=is_key)
    tl.store(values + in_page, new_left, mask=is_number & is_value[:, None])
    tl.store(values + in_page + half, new_right, mask=is_number & is_value[:, None])


@triton.jit(do_not_specialize=["page_table_stride"])
def attend_task(
    query,  # [rows, heads, head_dim]
    keys,  # of one layer of the cache
    values,
    output,  # [rows, heads, head_dim], written for rows of one task
    partials,  # [partials, heads, head_dim] fp32, written for the others
    lses,  # [partials, heads] fp32
    page_table,  # [slots, columns] int32
    row_positions,  # [rows] int32
    partial_starts,  # [rows + 1] int32
    tasks,  # [tasks, 8] int32
    page_table_stride,
    scale,  # of scores
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of one task's rows to its positions, for the heads that share one key head.

    The heads of a group are rows of one tile, so that keys and values are read once for all::

        tile      row 0 head 0 │ row 0 head 1 │ row 1 head 0 │ row 1 head 1 ...
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    program = tl.program_id(0)
    kv_head = program % NUM_KV_HEADS
    task = tasks + (program // NUM_KV_HEADS).to(tl.int64) * 8
    slot = tl.load(task).to(tl.int64)
    begin, end = tl.load(task + 1), tl.load(task + 2)
    first_row, num_first = tl.load(task + 3), tl.load(task + 4)
    second_row, num_rows = tl.load(task + 5), tl.load(task + 6)
    ordinal = tl.load(task + 7)

    m = tl.arange(0, BLOCK_M)
    number = m // GROUP
    is_row = number < num_rows
    row = tl.where(number < num_first, first_row + number, second_row + number - num_first)
    row = tl.where(is_row, row, first_row).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    position = tl.load(row_positions + row, mask=is_row, other=-1)

    d = tl.arange(0, BLOCK_D)
    is_dim = d < HEAD_DIM
    of_row = (row * NUM_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    is_query = is_row[:, None] & is_dim[None, :]
    q = tl.load(query + of_row, mask=is_query, other=0.0)

    best = tl.full((BLOCK_M,), NEVER_SEEN, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Powers of two are cheaper than those of e.
    scale_2 = scale * LOG2_E
    pages = page_table + slot * page_table_stride
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        is_there = n < end
        # Memory that was never written may hold NaN, so it is not read.
        page = tl.load(pages + n // PAGE_SIZE, mask=is_there, other=0).to(tl.int64)
        place = (page * NUM_KV_HEADS + kv_head) * PAGE_SIZE + n % PAGE_SIZE
        in_page = place[:, None] * HEAD_DIM + d[None, :]
        is_read = is_there[:, None] & is_dim[None, :]
        k = tl.load(keys + in_page, mask=is_read, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_2
        is_seen = is_there[None, :] & (n[None, :] <= position[:, None])
        scores = tl.where(is_seen, scores, NEVER_SEEN)
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # A row that has seen nothing yet keeps a sum of 0, where infinities would give NaN.
        offset = tl.where(new_best == NEVER_SEEN, 0.0, new_best)
        shares = tl.exp2(scores - offset[:, None])
        shrink = tl.exp2(best - offset)
        total = total * shrink + tl.sum(shares, axis=1)
        v = tl.load(values + in_page, mask=is_read, other=0.0).to(q.dtype)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(shares.to(v.dtype), v, mixed, input_precision="ieee")
        best = new_best

    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    start = tl.load(partial_starts + row, mask=is_row, other=0)
    is_whole = tl.load(partial_starts + row + 1, mask=is_row, other=0) == start
    tl.store(output + of_row, mixed.to(output.dtype.element_ty), mask=is_query & is_whole[:, None])
    is_part = is_row & (is_whole == 0)
    partial = ((start + ordinal) * NUM_HEADS + head).to(tl.int64)
    to_partial = partials + partial[:, None] * HEAD_DIM + d[None, :]
    tl.store(to_partial, mixed, mask=is_part[:, None] & is_dim[None, :])
    lse = tl.where(
        total == 0.0, NEVER_SEEN, best * LN_2 + tl.log(tl.where(total == 0.0, 1.0, total))
    )
    tl.store(lses + partial, lse, mask=is_part)


@triton.jit
def merge_partials(
    output,  # [rows, heads, head_dim], written
    partials,  # [partials, heads, head_dim] fp32
    lses,  # [partials, heads] fp32
    partial_starts,  # [rows + 1] int32
    merged_rows,  # [merged rows] int32
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of a row to all its positions, from its partial results and their LSEs."""
    row = tl.load(merged_rows + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    is_head = head < NUM_HEADS
    d = tl.arange(0, BLOCK_D)
    is_number = is_head[:, None] & (d < HEAD_DIM)[None, :]
    best = tl.full((HEADS_AT_ONCE,), NEVER_SEEN, tl.float32)
    total = tl.zeros((HEADS_AT_ONCE,), tl.float32)
    mixed = tl.zeros((HEADS_AT_ONCE, BLOCK_D), tl.float32)
    start, end = tl.load(partial_starts + row), tl.load(partial_starts + row + 1)
    for number in range(start, end):
        partial = (number * NUM_HEADS + head).to(tl.int64)
        lse = tl.load(lses + partial, mask=is_head, other=NEVER_SEEN)
        part = tl.load(
            partials + partial[:, None] * HEAD_DIM + d[None, :], mask=is_number, other=0.0
        )
        new_best = tl.maximum(best, lse)
        offset = tl.where(new_best == NEVER_SEEN, 0.0, new_best)
        shrink, share = tl.exp(best - offset), tl.exp(lse - offset)
        total = total * shrink + share
        mixed = mixed * shrink[:, None] + part * share[:, None]
        best = new_best
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    to_output = output + (row * NUM_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    # A row without partial results is done, and only fills the list up.
    tl.store(to_output, mixed.to(output.dtype.element_ty), mask=is_number & (start < end))
