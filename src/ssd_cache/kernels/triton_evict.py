"""The Triton kernel of an eviction: choose the victims of a head by counting, and move the survivors.

It is one launch for a store, and follows `cache/eviction.py` bit for bit, which takes some forty operations. A program
serves one row of the batch and one head: a token is dropped if few enough are dropped before it. By a learned score,
the kernel also computes the ranks. This module needs Triton, so only `cache/fused_eviction.py` imports it, on first
use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
import triton
import triton.language as tl

TILE = 32
"""Tokens that are compared with as many others at once, or moved at once."""


def launch(
    positions: torch.Tensor,
    ranks: torch.Tensor | None,
    received: torch.Tensor,
    states: list[torch.Tensor],
    scales: list[torch.Tensor],
    counts: Mapping[str, int],
    weights: tuple[torch.Tensor, ...] = (),
) -> None:
    """Evict tokens from full slots, in place.

    Args:
        positions: `[batch, heads, num_slots]`, int32; the freed slots get the numbers of the next tokens.
        ranks: `[batch, num_semantic, num_slots]`, float32, of the first heads; None if all heads are spatial.
        received: `[batch, num_scored, num_slots]`, float32, of the first heads: the attention that each token received,
            or its worth. Freed slots get zero.
        states: K and V, or their codes, `[batch, heads, num_prompt + num_slots, head_dim]`, contiguous.
        scales: of codes, `[batch, heads, num_slots]`, float32, else empty.
        counts: `num_evict`, `num_seen`, `num_recent` and `num_sinks` as for `select_victims`, and `num_prompt`, the
            columns of `states` before the slots. With `weights` also `first_new`, the first slot whose worth is due.
        weights: `key`, `value`, `row` and `column` of a `LearnedScore` of the heads in `received`, which then holds
            worth. The kernel adds the worth of new tokens to it, and ranks by the score; `ranks` are not read.
    """
    batch, heads, num_slots = positions.shape
    if not batch:
        return
    places = positions.new_empty(batch, heads, counts["num_evict"])
    is_kept = torch.empty_like(places)
    if weights:
        ranks = torch.empty_like(received)
    ranks = None if ranks is None else ranks.contiguous()
    counts = {"first_new": 0, **counts}
    keys, values = states
    with torch.cuda.device(positions.device) if positions.is_cuda else contextlib.nullcontext():
        evict_kernel[(heads, batch)](
            *(positions, received if ranks is None else ranks, received, keys, values),
            *(scales or (received, received)),
            *(weights or [received] * 4),
            *(places, is_kept, 0 if ranks is None else ranks.shape[1], received.shape[1], num_slots),
            **counts,
            HEAD_DIM=keys.shape[3],
            VALUE_DIM=values.shape[3],
            BLOCK_HEAD=triton.next_power_of_2(keys.shape[3]),
            BLOCK_VALUE=triton.next_power_of_2(values.shape[3]),
            HAS_SCALES=bool(scales),
            GRID_ROWS=weights[3].shape[1] if weights else 0,
            GRID_COLUMNS=weights[3].shape[2] if weights else 0,
            TILE=TILE,
            num_warps=4,
        )


@triton.jit
def order_of(at, positions, ranks, is_semantic, num_slots, num_seen, num_recent, num_sinks):
    """A number for each slot `at`; the slots with the lowest numbers are emptied. No two are equal."""
    is_slot = at < num_slots
    position = tl.load(positions + at, mask=is_slot, other=0)
    if is_semantic:
        rank = tl.load(ranks + at, mask=is_slot, other=0.0) + 0.0  # -0.0 becomes 0.0
        rank = tl.where((position >= num_seen - num_recent) | (position < num_sinks), float("inf"), rank)
        bits = rank.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the numbers
        first = tl.where(rank == rank, bits, 0x7FFFFFFF)  # NaN is above all numbers
    else:
        first = tl.where(position < num_sinks, num_seen, position)
    order = (first.to(tl.int64) << 32) + position  # of equal ranks, the older token first
    return tl.where(is_slot, order, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def rank_by_score(
    ranks,
    worth,
    positions,
    keys,
    values,
    key_weights,
    value_weights,
    row_table,
    column_table,
    num_slots,
    num_seen,
    first_new,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    GRID_ROWS: tl.constexpr,
    GRID_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the ranks of one head's tokens by a learned score, and the worth of those from slot `first_new` on."""
    tile = tl.arange(0, TILE)
    dim = tl.arange(0, BLOCK_HEAD)
    value_dim = tl.arange(0, BLOCK_VALUE)
    of_key = tl.load(key_weights + dim, mask=dim < HEAD_DIM, other=0.0)
    of_value = tl.load(value_weights + value_dim, mask=value_dim < VALUE_DIM, other=0.0)
    for start in range(first_new, num_slots, TILE):
        at = start + tile
        is_slot = at < num_slots
        in_head = is_slot[:, None] & (dim < HEAD_DIM)[None, :]
        in_value = is_slot[:, None] & (value_dim < VALUE_DIM)[None, :]
        k = tl.load(keys + at[:, None] * HEAD_DIM + dim[None, :], mask=in_head, other=0.0)
        v = tl.load(values + at[:, None] * VALUE_DIM + value_dim[None, :], mask=in_value, other=0.0)
        sums = tl.sum(k.to(tl.float32) * of_key[None, :], 1) + tl.sum(v.to(tl.float32) * of_value[None, :], 1)
        tl.store(worth + at, sums, mask=is_slot)
    tl.debug_barrier()  # wait for what other threads of this program wrote
    now = tl.minimum(num_seen // GRID_COLUMNS, GRID_ROWS - 1)  # past the grid's end, the last row
    for start in range(0, num_slots, TILE):
        at = start + tile
        is_slot = at < num_slots
        position = tl.load(positions + at, mask=is_slot, other=0)
        row = tl.minimum(position // GRID_COLUMNS, now)
        by_row = tl.load(row_table + now * GRID_ROWS + row, mask=is_slot, other=0.0)
        cell = (now - row) * GRID_COLUMNS + position % GRID_COLUMNS
        by_place = by_row + tl.load(column_table + cell, mask=is_slot, other=0.0)
        tl.store(ranks + at, by_place + tl.load(worth + at, mask=is_slot, other=0.0), mask=is_slot)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["num_seen", "first_new"])
def evict_kernel(
    positions,
    ranks,
    received,
    keys,
    values,
    key_scales,
    value_scales,
    key_weights,
    value_weights,
    row_table,
    column_table,
    places,
    is_kept,
    num_semantic,
    num_scored,
    num_slots,
    num_prompt,
    num_evict,
    num_seen,
    num_recent,
    num_sinks,
    first_new,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    GRID_ROWS: tl.constexpr,
    GRID_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Evict `num_evict` tokens from one head of one row."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    store_head = row * tl.num_programs(0) + head
    is_semantic = head < num_semantic
    positions += store_head * num_slots
    ranks += tl.where(is_semantic, (row * num_semantic + head) * num_slots, 0)
    places += store_head * num_evict
    is_kept += store_head * num_evict
    keys += (store_head * (num_prompt + num_slots) + num_prompt) * HEAD_DIM
    values += (store_head * (num_prompt + num_slots) + num_prompt) * VALUE_DIM
    received += (row * num_scored + head) * num_slots
    first_free = num_slots - num_evict
    tile = tl.arange(0, TILE)

    if GRID_ROWS > 0:  # noqa: SIM102 -- known when compiled, the other when it runs
        if is_semantic:
            rank_by_score(
                ranks,
                received,
                positions,
                keys,
                values,
                key_weights + head * HEAD_DIM,
                value_weights + head * VALUE_DIM,
                row_table + head * GRID_ROWS * GRID_ROWS,
                column_table + head * GRID_ROWS * GRID_COLUMNS,
                num_slots,
                num_seen,
                first_new,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_HEAD,
                BLOCK_VALUE,
                GRID_ROWS,
                GRID_COLUMNS,
                TILE,
            )

    # the victims before the freed slots, in order, are the places of the survivors in these slots
    num_places = 0
    for start in range(0, num_slots, TILE):
        at = start + tile
        own = order_of(at, positions, ranks, is_semantic, num_slots, num_seen, num_recent, num_sinks)
        before = tl.zeros([TILE], tl.int32)
        for other in range(0, num_slots, TILE):
            theirs = order_of(other + tile, positions, ranks, is_semantic, num_slots, num_seen, num_recent, num_sinks)
            before += tl.sum((theirs[None, :] < own[:, None]).to(tl.int32), 1)
        is_victim = (before < num_evict) & (at < num_slots)
        is_place = (is_victim & (at < first_free)).to(tl.int32)
        tl.store(places + num_places + tl.cumsum(is_place, 0) - 1, at, mask=is_place != 0)
        num_places += tl.sum(is_place, 0)
        is_last = (at >= first_free) & (at < num_slots)
        tl.store(is_kept + at - first_free, (~is_victim).to(tl.int32), mask=is_last)
    tl.debug_barrier()  # wait for what other threads of this program wrote

    dim = tl.arange(0, BLOCK_HEAD)
    value_dim = tl.arange(0, BLOCK_VALUE)
    is_scored = head < num_scored
    num_moved = 0
    for start in range(0, num_evict, TILE):
        is_free = start + tile < num_evict
        source = first_free + start + tile
        moves = tl.load(is_kept + start + tile, mask=is_free, other=0)
        place = tl.load(places + num_moved + tl.cumsum(moves, 0) - 1, mask=moves != 0, other=0)
        num_moved += tl.sum(moves, 0)
        moves = moves != 0
        position = tl.load(positions + source, mask=moves, other=0)
        tl.store(positions + place, position, mask=moves)
        tl.store(positions + source, num_seen + start + tile, mask=is_free)
        if is_scored:
            tl.store(received + place, tl.load(received + source, mask=moves, other=0.0), mask=moves)
            tl.store(received + source, tl.zeros([TILE], tl.float32), mask=is_free)
        if HAS_SCALES:
            at = store_head * num_slots
            tl.store(key_scales + at + place, tl.load(key_scales + at + source, mask=moves, other=0.0), mask=moves)
            tl.store(value_scales + at + place, tl.load(value_scales + at + source, mask=moves, other=0.0), mask=moves)
        in_head = moves[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(keys + source[:, None] * HEAD_DIM + dim[None, :], mask=in_head, other=0)
        tl.store(keys + place[:, None] * HEAD_DIM + dim[None, :], k, mask=in_head)
        in_value = moves[:, None] & (value_dim < VALUE_DIM)[None, :]
        v = tl.load(values + source[:, None] * VALUE_DIM + value_dim[None, :], mask=in_value, other=0)
        tl.store(values + place[:, None] * VALUE_DIM + value_dim[None, :], v, mask=in_value)
