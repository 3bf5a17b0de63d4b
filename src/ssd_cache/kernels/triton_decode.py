"""The Triton kernels behind `dispatch.py`: one program for each row of the batch and each head of a store.

The first loop reads K and V once and stores each token's logit in `logits`. A short second loop computes the softmax
weights from the logits, since they depend on all tokens. Few rows and heads do not occupy a GPU: the tokens of a head
are then split among several programs, and a second kernel joins their results. This module needs Triton, so only
`dispatch.py` imports it, on first use.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl

from ssd_cache.kernels.checks import DTYPES, Arguments, LayerSizes, check_stores, check_token

TILE = 1 << 14
"""Bytes in a tile of keys of a program with four warps: 64 tokens of 128 numbers in bfloat16."""

SMALL_TILE = 16
"""Tokens in a tile of a program with one warp."""

MAX_SPLITS = 32
"""Programs that share the tokens of a head at most."""


def launch(given: Arguments) -> None:
    """Run the kernel over each store of a layer; see `dispatch.decode`.

    Invalid heads or an invalid slot give NaN, since checking them would mean waiting for the device.

    Raises:
        ValueError: as for `checks.check_token`.
    """
    layer = check_token(given, DTYPES)
    sizes = check_stores(given, layer)
    if not layer.batch:
        return
    query = given.query
    options = launch_options(layer, query.dtype.itemsize, given.kv_dtype)
    new = [states.contiguous() for states in (query, given.new_key, given.new_value)]
    # Triton launches on the current device, which may not be the device of this layer
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        for store, size in zip(given.stores(), sizes, strict=True):
            keys, values, scores, heads, mask, slot, *codes = store
            num_heads, num_scored, num_prompt, num_slots = size
            splits = num_splits(layer.batch * num_heads, (num_prompt + num_slots) // options["BLOCK_COLUMNS"], query)
            logits = scores.new_empty(layer.batch, num_scored, layer.groups, num_slots)
            parts = scores  # of several programs: the sums of each, its highest logit, and its total of weights
            if splits > 1:
                parts = scores.new_empty(layer.batch, num_heads, splits, layer.groups, layer.value_dim + 2)
            codes = [scores if tensor is None else tensor for tensor in codes]
            states = (*new, keys, values, *codes, scores, logits, parts)
            place = (scores if mask is None else mask, heads, slot, given.output)
            numbers = (layer.kv_heads, num_scored, num_prompt, num_slots)
            grid = num_heads, layer.batch, splits
            shared = {
                "GROUPS": layer.groups,
                "VALUE_DIM": layer.value_dim,
                "NUM_SPLITS": splits,
                **{name: options[name] for name in ("BLOCK_GROUPS", "BLOCK_VALUE", "BLOCK_COLUMNS", "num_warps")},
            }
            decode_kernel[grid](
                *(*states, *place, given.scaling, *numbers),
                HEAD_DIM=layer.head_dim,
                BLOCK_HEAD=options["BLOCK_HEAD"],
                HAS_MASK=mask is not None,
                KV_DTYPE=given.kv_dtype,
                # Triton's interpreter, used without a GPU, does not support bfloat16 matrix products
                UPCAST=not query.is_cuda,
                num_stages=options["num_stages"],
                **shared,
            )
            if splits > 1:
                join_kernel[grid](*(scores, logits, parts, heads, slot, given.output, *numbers), **shared)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_splits(programs: int, num_tiles: int, query: torch.Tensor) -> int:
    """How many programs share the tokens of a head: a power of two, 1 where there are enough programs without.

    With fewer than two programs for each multiprocessor, tokens are split until there are as many, or until each
    program has one tile of a full store. Nothing was timed on a GPU.

    Args:
        programs: rows of the batch times heads of the store.
        num_tiles: full tiles in the prompt and the slots of a head.
        query: a tensor of the layer; without a GPU, nothing is split.
    """
    splits = 1
    if query.is_cuda:
        enough = 2 * num_multiprocessors(query.device)
        while splits * programs < enough and 2 * splits <= min(num_tiles, MAX_SPLITS):
            splits *= 2
    return splits


def launch_options(layer: LayerSizes, itemsize: int, kv_dtype: str | None) -> dict[str, int]:
    """Sizes of the kernel's tiles, all powers of two, its warps and its pipeline's stages.

    A program of one warp waits for no other warp, and more of them fit on a multiprocessor. It is used where a tile
    fits into the registers of a warp. These choices follow from compiled code; nothing was timed on a GPU. The tests
    state registers and barriers.

    Args:
        layer: sizes of the layer.
        itemsize: bytes of a number of K and V.
        kv_dtype: as for `dispatch.decode`.
    """
    least = 1 if layer.groups == 1 else 16  # `tl.dot` on a GPU needs at least 16 rows and columns
    block_head = max(least, triton.next_power_of_2(layer.head_dim))
    block_value = max(least, triton.next_power_of_2(layer.value_dim))
    is_plain = kv_dtype is None or (kv_dtype == "int8" and layer.groups == 1)  # else registers would be spilled
    fits = itemsize == 2 and max(block_head, block_value) <= 128 and is_plain
    by_bytes = min(128, max(16, TILE // (block_head * itemsize * (2 if kv_dtype else 1))))  # codes are tiles, too
    return {
        "BLOCK_GROUPS": max(least, triton.next_power_of_2(layer.groups)),
        "BLOCK_HEAD": block_head,
        "BLOCK_VALUE": block_value,
        "BLOCK_COLUMNS": SMALL_TILE if fits else by_bytes,
        "num_warps": 1 if fits else 4,
        "num_stages": 2,
    }


@triton.jit
def place_of(head_pointer, slot_pointer, num_kv_heads, num_slots):
    """The layer's KV head and the token's slot, 0 for both if one is invalid, and whether both are valid."""
    head, slot = tl.load(head_pointer), tl.load(slot_pointer)
    is_there = (head >= 0) & (head < num_kv_heads) & (slot >= 0) & (slot < num_slots)
    return tl.where(is_there, head, 0), tl.where(is_there, slot, 0).to(tl.int32), is_there


@triton.jit
def add_received(mine, kept, begin, end, highest, total, in_group, BLOCK_COLUMNS: tl.constexpr):
    """Add the attention that tokens in the slots `begin` to `end` received, from the kept logits, to their scores."""
    for start in range(begin, end, BLOCK_COLUMNS):
        at = start + tl.arange(0, BLOCK_COLUMNS)
        is_slot = at < end
        weights = tl.load(kept + at[None, :], mask=in_group[:, None] & is_slot[None, :], other=float("-inf"))
        received = tl.sum(tl.exp(weights - highest[:, None]) / total[:, None], 0)
        tl.store(mine + at, tl.load(mine + at, mask=is_slot, other=0.0) + received, mask=is_slot)


@triton.jit
def quantize(states, KV_DTYPE: tl.constexpr):
    """Codes and scale of one token, those of `eight_bits.quantize`."""
    states = states.to(tl.float32)
    bits = tl.max(states.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # as an integer, NaN is above all numbers
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0 if KV_DTYPE == "int8" else 448.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    numbers = tl.div_rn(states, scale + tl.zeros_like(states))
    if KV_DTYPE == "int8":  # adding 1.5 * 2^23 rounds to an integer, in the lowest bits
        return (numbers + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8), scale
    bits = numbers.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size - (120 << 23) + 0x7FFFF + ((size >> 20) & 1)) >> 20
    subnormal = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0x7F
    code = tl.where(size < (121 << 23), subnormal, tl.where(size < 0x43F00000, normal, 0x7F))
    return (((bits >> 24) & 0x80) | code).to(tl.int8), scale


@triton.jit
def numbers_of(codes, KV_DTYPE: tl.constexpr):
    """The numbers of codes, without their scales, in float32."""
    if KV_DTYPE == "int8":
        return codes.to(tl.float32)
    bits = codes.to(tl.int32)
    size = (bits & 0x7F) << 20
    normal = (size + (120 << 23)).to(tl.float32, bitcast=True)
    subnormal = (size + (121 << 23)).to(tl.float32, bitcast=True) - 0.015625
    number = tl.where(size < (1 << 23), subnormal, normal)
    return tl.where(bits < 0, -number, number)


@triton.jit
def decode_kernel(
    query,
    new_key,
    new_value,
    keys,
    values,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    scores,
    logits,
    parts,
    mask,
    heads,
    slot_pointer,
    output,
    scaling,
    num_kv_heads,
    num_scored,
    num_prompt,
    num_slots,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KV_DTYPE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One token's step for one head of a store: write K and V, attend, add each token's attention to its score.

    With several splits, each attends to its own share of the tokens, the first also to the new one, and the rest is
    left to `join_kernel`.
    """
    # scales of values may be too small for float16; in TF32, its numbers and all codes are exact
    is_half: tl.constexpr = KV_DTYPE is not None and keys.dtype.element_ty == tl.float16
    dot_type: tl.constexpr = tl.float32 if UPCAST or is_half else keys.dtype.element_ty
    precision: tl.constexpr = "tf32" if is_half else "ieee"
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    model_head, slot, is_there = place_of(heads + head, slot_pointer, num_kv_heads, num_slots)
    end = num_prompt + slot  # slots fill in order, so all columns before this one are taken
    split = tl.program_id(2)
    is_first = split == 0
    share = end if NUM_SPLITS == 1 else share_of(end, NUM_SPLITS, BLOCK_COLUMNS)
    begin = split * share
    length = num_prompt + num_slots
    store_head = row * tl.num_programs(0) + head
    first = store_head * (length if KV_DTYPE is None else num_prompt)
    first_slot = store_head * num_slots - num_prompt  # plus a column, its slot

    group = tl.arange(0, BLOCK_GROUPS)
    in_group = group < GROUPS
    dim = tl.arange(0, BLOCK_HEAD)
    in_head = dim < HEAD_DIM
    value_dim = tl.arange(0, BLOCK_VALUE)
    in_value = value_dim < VALUE_DIM
    column = tl.arange(0, BLOCK_COLUMNS)

    layer_head = row * num_kv_heads + model_head
    q_at = (layer_head * GROUPS + group[:, None]) * HEAD_DIM + dim[None, :]
    q = tl.load(query + q_at, mask=in_group[:, None] & in_head[None, :], other=0.0)
    own_key = tl.load(new_key + layer_head * HEAD_DIM + dim, mask=in_head, other=0.0)
    own_value = tl.load(new_value + layer_head * VALUE_DIM + value_dim, mask=in_value, other=0.0)
    # all splits write the same numbers, which none of them reads
    if KV_DTYPE is None:
        tl.store(keys + (first + end) * HEAD_DIM + dim, own_key, mask=in_head)
        tl.store(values + (first + end) * VALUE_DIM + value_dim, own_value, mask=in_value)
    else:
        own_codes, own_scale = quantize(own_key, KV_DTYPE)
        tl.store(key_codes + (first_slot + end) * HEAD_DIM + dim, own_codes, mask=in_head)
        tl.store(key_scales + first_slot + end, own_scale)
        own_key = numbers_of(own_codes, KV_DTYPE) * own_scale
        own_codes, own_scale = quantize(own_value, KV_DTYPE)
        tl.store(value_codes + (first_slot + end) * VALUE_DIM + value_dim, own_codes, mask=in_value)
        tl.store(value_scales + first_slot + end, own_scale)
        own_value = numbers_of(own_codes, KV_DTYPE) * own_scale

    # The softmax starts from the new token's logit, which is never masked, so there is always a highest logit.
    scaled = q.to(tl.float32) * tl.where(is_there, scaling, float("nan"))
    own = tl.sum(scaled * own_key.to(tl.float32)[None, :], 1)
    highest = own
    total = tl.zeros([BLOCK_GROUPS], tl.float32) + tl.where(is_first, 1.0, 0.0)
    result = tl.zeros([BLOCK_GROUPS, BLOCK_VALUE], tl.float32)
    result += tl.where(is_first, own_value.to(tl.float32), 0.0)[None, :]
    is_scored = head < num_scored
    kept = logits + ((row * num_scored + head) * GROUPS + group[:, None]) * num_slots
    for start in range(begin, tl.minimum(begin + share, end), BLOCK_COLUMNS):
        at = start + column
        is_stored = at < end
        is_slot = is_stored & (at >= num_prompt)
        # the columns of `keys` and `values`
        is_plain = is_stored & (at < num_prompt) if KV_DTYPE is not None else is_stored
        k = tl.load(
            keys + (first + at)[:, None] * HEAD_DIM + dim[None, :],
            mask=is_plain[:, None] & in_head[None, :],
            other=0.0,
        )
        v = tl.load(
            values + (first + at)[:, None] * VALUE_DIM + value_dim[None, :],
            mask=is_plain[:, None] & in_value[None, :],
            other=0.0,
        )
        if KV_DTYPE is not None:  # codes are exact in any dtype, so scales multiply logits and weights
            slots_at = (first_slot + at)[:, None]
            key_at, value_at = slots_at * HEAD_DIM + dim[None, :], slots_at * VALUE_DIM + value_dim[None, :]
            k_codes = tl.load(key_codes + key_at, mask=is_slot[:, None] & in_head[None, :], other=0)
            v_codes = tl.load(value_codes + value_at, mask=is_slot[:, None] & in_value[None, :], other=0)
            k = tl.where(is_slot[:, None], numbers_of(k_codes, KV_DTYPE).to(k.dtype), k)
            v = tl.where(is_slot[:, None], numbers_of(v_codes, KV_DTYPE).to(v.dtype), v)
            key_scale = tl.load(key_scales + first_slot + at, mask=is_slot, other=1.0)
            value_scale = tl.load(value_scales + first_slot + at, mask=is_slot, other=1.0)
        if BLOCK_GROUPS == 1:
            weights = tl.sum(scaled * k.to(tl.float32), 1)[None, :]
        else:
            weights = tl.dot(q.to(dot_type), tl.trans(k.to(dot_type)), input_precision=precision) * scaling
        if KV_DTYPE is not None:
            weights = weights * key_scale[None, :]
        is_seen = is_stored
        if HAS_MASK:
            is_seen = is_seen & (tl.load(mask + row * length + at, mask=is_stored, other=0) != 0)
        weights = tl.where(is_seen[None, :], weights, float("-inf"))
        if is_scored:
            tl.store(kept + (at - num_prompt)[None, :], weights, mask=in_group[:, None] & is_slot[None, :])
        higher = tl.maximum(highest, tl.max(weights, 1))
        shrink = tl.exp(highest - higher)
        weights = tl.exp(weights - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if KV_DTYPE is not None:
            weights = weights * value_scale[None, :]
        if BLOCK_GROUPS == 1:
            sums = tl.sum(tl.trans(weights) * v.to(tl.float32), 0)[None, :]
        else:
            rounded = weights.to(v.dtype) if KV_DTYPE is None else weights  # as in `tl.dot` on a GPU
            sums = tl.dot(rounded.to(dot_type), v.to(dot_type), input_precision=precision)
        result = result * shrink[:, None] + sums
        highest = higher

    if NUM_SPLITS > 1:
        if is_scored & is_first:
            tl.store(kept + slot, own[:, None], mask=in_group[:, None])
        part = parts + ((store_head * NUM_SPLITS + split) * GROUPS + group) * (VALUE_DIM + 2)
        tl.store(part[:, None] + value_dim[None, :], result, mask=in_group[:, None] & in_value[None, :])
        tl.store(part + VALUE_DIM, highest, mask=in_group)
        tl.store(part + VALUE_DIM + 1, total, mask=in_group)
    else:
        out_at = layer_head * GROUPS + group
        tl.store(
            output + out_at[:, None] * VALUE_DIM + value_dim[None, :],
            (result / total[:, None]).to(output.dtype.element_ty),
            mask=in_group[:, None] & in_value[None, :],
        )
        if is_scored:
            tl.debug_barrier()  # wait for the logits that other threads of this program wrote
            mine = scores + (row * num_scored + head) * num_slots
            add_received(mine, kept, 0, slot, highest, total, in_group, BLOCK_COLUMNS)
            received = tl.sum(tl.where(in_group, tl.exp(own - highest) / total, 0.0), 0)
            tl.store(mine + slot, tl.load(mine + slot) + received)


@triton.jit
def share_of(count, NUM_SPLITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Tokens of each split but the last ones: whole tiles."""
    return tl.cdiv(tl.cdiv(count, NUM_SPLITS), BLOCK_COLUMNS) * BLOCK_COLUMNS


@triton.jit
def join_kernel(
    scores,
    logits,
    parts,
    heads,
    slot_pointer,
    output,
    num_kv_heads,
    num_scored,
    num_prompt,
    num_slots,
    GROUPS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The softmax over the splits of `decode_kernel`: the first program writes the output, each scores a share."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    model_head, slot, _ = place_of(heads + head, slot_pointer, num_kv_heads, num_slots)
    group = tl.arange(0, BLOCK_GROUPS)
    in_group = group < GROUPS
    value_dim = tl.arange(0, BLOCK_VALUE)
    in_value = value_dim < VALUE_DIM
    part = parts + ((row * tl.num_programs(0) + head) * NUM_SPLITS * GROUPS + group) * (VALUE_DIM + 2)
    step = GROUPS * (VALUE_DIM + 2)

    highest = tl.load(part + VALUE_DIM, mask=in_group, other=0.0)
    for other in range(1, NUM_SPLITS):
        highest = tl.maximum(highest, tl.load(part + other * step + VALUE_DIM, mask=in_group, other=0.0))
    total = tl.zeros([BLOCK_GROUPS], tl.float32)
    result = tl.zeros([BLOCK_GROUPS, BLOCK_VALUE], tl.float32)
    for other in range(NUM_SPLITS):
        at = part + other * step
        shrink = tl.exp(tl.load(at + VALUE_DIM, mask=in_group, other=0.0) - highest)
        total += shrink * tl.load(at + VALUE_DIM + 1, mask=in_group, other=1.0)
        sums = tl.load(at[:, None] + value_dim[None, :], mask=in_group[:, None] & in_value[None, :], other=0.0)
        result += shrink[:, None] * sums
    if split == 0:
        out_at = (row * num_kv_heads + model_head) * GROUPS + group
        tl.store(
            output + out_at[:, None] * VALUE_DIM + value_dim[None, :],
            (result / total[:, None]).to(output.dtype.element_ty),
            mask=in_group[:, None] & in_value[None, :],
        )
    if head < num_scored:
        kept = logits + ((row * num_scored + head) * GROUPS + group[:, None]) * num_slots
        mine = scores + (row * num_scored + head) * num_slots
        share = share_of(slot + 1, NUM_SPLITS, BLOCK_COLUMNS)
        begin = split * share
        end = tl.minimum(begin + share, slot + 1)
        add_received(mine, kept, begin, end, highest, total, in_group, BLOCK_COLUMNS)
