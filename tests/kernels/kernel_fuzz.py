"""Random calls of the operators that enter C++, each compared with torch or refused; run as a program of its own.

    python tests/kernels/kernel_fuzz.py SEED CASES [--asan]

A wrong access ends the process, so `test_kernel_checks.py` starts this as a child. With `--asan` the loops are built
with AddressSanitizer, whose library has to be preloaded. Prints how many calls were answered and how many refused.
"""

from __future__ import annotations

import collections
import random
import sys

import torch
import torch.nn.functional as F

from ssd_cache.kernels import cpu_library
from ssd_cache.kernels import cpu_loops as cpu_kernels
from ssd_cache.kernels import dispatch as fused
from ssd_cache.kernels.eight_bits import KV_DTYPES, dequantize, quantize
from ssd_cache.kernels.packed_linears import COPY, packed_linears

DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int32)
CODES = ("key_codes", "key_scales", "value_codes", "value_scales")
REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError, MemoryError)


class Subclass(torch.Tensor):
    """A tensor that is not plain."""


def reference(query, new_key, new_value, keys, values, scores, *codes, kv_dtype, heads, mask, slot, scaling):
    """What a step writes, the values that it reads, and the output of these heads in float64, by the rules."""
    slot = int(slot)
    end = keys.shape[2] + slot - (0 if kv_dtype else scores.shape[2])
    keys, values, scores, *codes = (tensor.clone() for tensor in (keys, values, scores, *codes))
    written = [keys, values, scores, *codes]
    if kv_dtype:
        new = *quantize(new_key[:, heads, 0], kv_dtype), *quantize(new_value[:, heads, 0], kv_dtype)
        for held, states in zip(codes, new, strict=True):
            held[:, :, slot] = states
        keys, values = (
            torch.cat([prompt.float(), dequantize(*slots, kv_dtype, torch.float32)], dim=2)
            for prompt, slots in ((keys, codes[:2]), (values, codes[2:]))
        )
    else:
        keys[:, :, end], values[:, :, end] = new_key[:, heads, 0], new_value[:, heads, 0]
    num_prompt = end - slot
    logits = scaling * query[:, heads].double() @ keys[:, :, : end + 1].double().mT
    if mask is not None:
        seen = mask[:, None, None, : end + 1].clone()
        seen[..., end] = True  # the token itself is always seen
        logits = logits.masked_fill(~seen, float("-inf"))
    weights = logits.softmax(-1)
    received = weights[:, : scores.shape[1], :, num_prompt:].sum(2)
    scores[:, :, : slot + 1] += received.float()
    return written, values, weights @ values[:, :, : end + 1].double()


def spoil(chance: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with another shape, dtype, layout, device or type."""
    how = chance.randrange(9)
    if how == 0 and tensor.dim():
        dim = chance.randrange(tensor.dim())
        return tensor.narrow(dim, 0, max(0, tensor.shape[dim] - 1)).contiguous()
    if how == 1 and tensor.dim():
        dim = chance.randrange(tensor.dim())
        return torch.cat([tensor, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))], dim)
    if how == 2:
        return tensor.to(chance.choice(DTYPES))
    if how == 3 and tensor.dim() > 1:  # the same shape, with other strides
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == 4:
        return tensor.unsqueeze(0) if chance.random() < 0.5 or not tensor.numel() or not tensor.dim() else tensor[0]
    if how == 5:
        return tensor.to("meta")
    if how == 6:
        return tensor.as_subclass(Subclass)
    if how == 7 and tensor.dim():  # huge, without memory behind it
        sizes = [*tensor.shape]
        dim = chance.randrange(tensor.dim())
        one, huge = ([*sizes[:dim], size, *sizes[dim + 1 :]] for size in (1, 1 << 40))
        return tensor.new_zeros(one).expand(huge)
    return tensor.new_empty([0] * tensor.dim())


def random_store(chance: random.Random, heads: list[int], batch: int, num_prompt: int, dims, dtype, has_mask, kv_dtype):
    """A store of some of a layer's heads, with a random number of slots and scored heads."""
    num_slots = chance.randint(1, 40 if chance.random() < 0.2 else 9)
    length = num_prompt + num_slots
    states = [torch.randn(batch, len(heads), length, dim).to(dtype) for dim in dims]
    codes = [part for each in states if kv_dtype for part in quantize(each[:, :, num_prompt:], kv_dtype)]
    keys, values = (each[:, :, : num_prompt if kv_dtype else None].contiguous() for each in states)
    return {
        "keys": keys,
        "values": values,
        **dict(zip(CODES, codes, strict=False)),
        "scores": torch.rand(batch, chance.randint(0, len(heads)), num_slots),
        "heads": torch.tensor(heads),
        "mask": (torch.rand(batch, length) < 0.7) if has_mask else None,
        "slot": torch.tensor(chance.randrange(num_slots)),
    }


def decode_case(chance: random.Random) -> str:
    """One step over a layer's stores: the numbers of `reference`, or a refusal that leaves everything as it was."""
    dtype = chance.choice(tuple(cpu_kernels.DECODERS))
    batch, kv_heads, groups = chance.randrange(4), chance.randint(1, 4), chance.choice((1, 1, 2, 3))
    dims, num_prompt = (chance.choice((1, 3, 8, 16, 33)), chance.choice((1, 4, 16, 20))), chance.randrange(5)
    has_mask, kv_dtype = chance.random() < 0.5, chance.choice((None, *KV_DTYPES))
    heads = chance.sample(range(kv_heads), chance.randint(1, kv_heads))
    cut = chance.randint(0, len(heads) - 1)
    parts = [part for part in (heads[:cut], heads[cut:]) if part]  # of two stores, or one
    stores = [random_store(chance, part, batch, num_prompt, dims, dtype, has_mask, kv_dtype) for part in parts]
    token = {
        "query": torch.randn(batch, kv_heads, groups, dims[0]).to(dtype),
        "new_key": torch.randn(batch, kv_heads, 1, dims[0]).to(dtype),
        "new_value": torch.randn(batch, kv_heads, 1, dims[1]).to(dtype),
        "scaling": chance.choice((0.3, 1.0, 30.0, 0.0)),
        "output": torch.full((batch, kv_heads, groups, dims[1]), 7.0, dtype=dtype),
    }
    is_spoilt = chance.random() < 0.7
    places = [(group, name) for group in (token, *stores) for name, value in group.items() if torch.is_tensor(value)]
    for arguments, name in chance.sample(places, chance.randint(1, 2) if is_spoilt else 0):
        if name == "heads" and chance.random() < 0.5:
            heads = arguments[name] = arguments[name].clone()
            heads.flatten()[:1] = chance.choice((-1, kv_heads, 1 << 40))
        elif name == "slot" and chance.random() < 0.5:
            num_slots = arguments["scores"].shape[-1] if arguments["scores"].dim() else 1
            arguments[name] = torch.tensor(chance.choice((-1, num_slots, -(1 << 62), (1 << 62) + 1)))
        else:
            arguments[name] = spoil(chance, arguments[name])
    names = ("keys", "values", "scores", *(CODES if kv_dtype else ()))
    written = [token["output"], *(store[name] for store in stores for name in names)]
    is_real = all(tensor.device.type == "cpu" and tensor.numel() < 1 << 20 for tensor in written)
    before = [tensor.clone() for tensor in written] if is_real else []
    lists = [[store[name] for store in stores] for name in ("keys", "values", "scores", "heads", "mask", "slot")]
    lists[4] = [mask for mask in lists[4] if mask is not None]
    run = torch.ops.ssd_cache.decode if chance.random() < 0.5 else fused.decode
    try:
        codes = [store[name] for store in stores for name in CODES if kv_dtype]
        new = token["query"], token["new_key"], token["new_value"]
        run(*new, *lists, token["scaling"], token["output"], codes, kv_dtype)
    except REFUSALS:
        for tensor, then in zip(written, before, strict=False):
            assert torch.equal(tensor, then), "a tensor was written before the call was refused"
        return "refused"
    limit = 16 * torch.finfo(dtype).eps
    # logits of up to 30 * 33 * 9 in float32 sums; their errors are those of the weights
    slack = 1 + 0.01 * abs(token["scaling"]) * token["query"].shape[3]
    for number, store in enumerate(stores):
        states = before[1 + len(names) * number : 1 + len(names) * (number + 1)]
        rest = {name: store[name] for name in ("heads", "mask", "slot")}
        expected, values, attended = reference(*new, *states, kv_dtype=kv_dtype, scaling=token["scaling"], **rest)
        for name, tensor in zip(names, expected, strict=True):
            assert name == "scores" or torch.equal(store[name], tensor), name
        size = float(values.abs().max()) if values.numel() else 0.0
        output = token["output"][:, store["heads"]].double()
        torch.testing.assert_close(output, attended, rtol=0, atol=limit * slack * max(size, 1.0))
        torch.testing.assert_close(store["scores"], expected[2], rtol=1e-5, atol=1e-4 * slack)
    return "answered"


def linear_case(chance: random.Random) -> str:
    """One product in the block, the layer's or the operator's: what F.linear gives, result or error."""
    in_features, out_features = chance.choice((1, 7, 16, 48)), chance.choice((16, 32, 80, 20, 0))
    linear = torch.nn.Linear(in_features, out_features, bias=chance.random() < 0.5)
    shape = chance.choice(((3,), (1, 1), (2, 1), (0,), (17, 1), (2, 3), (), (1, 1, 1), (600,)))
    states = torch.randn(*shape, in_features)
    with packed_linears(linear):
        if chance.random() < 0.3:
            linear(torch.randn(2, in_features))  # packed already when it changes
        if chance.random() < 0.6:
            what = chance.choice(("states", "states", "weight", "bias", "data"))
            if what == "states":
                states = spoil(chance, states)
            elif what == "data":
                other = spoil(chance, linear.weight.data)
                if type(other) is torch.Tensor and other.dtype.is_floating_point and other.device.type == "cpu":
                    linear.weight.data = other
            elif getattr(linear, what) is not None:
                other = spoil(chance, getattr(linear, what).data)
                if other.dtype.is_floating_point:
                    setattr(linear, what, torch.nn.Parameter(other))
        outcomes = []
        is_layer = chance.random() < 0.5
        for run in (lambda *own: linear(own[0]) if is_layer else torch.ops.ssd_cache.packed_linear(*own), F.linear):
            try:
                outcomes.append(run(states, linear.weight, linear.bias))
            except REFUSALS as error:
                outcomes.append(error)
    assert not hasattr(linear.weight, COPY)
    ours, theirs = outcomes
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        # a subclass that the operator gets directly, and not from the layer, may be refused
        assert isinstance(ours, Exception), outcomes
        assert isinstance(theirs, Exception) or not is_layer, outcomes
        return "refused"
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    # torch's own result has no numbers where one of the tensors has none
    if all(tensor is None or tensor.device.type == "cpu" for tensor in (states, linear.weight, linear.bias)):
        limit = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 2e-2  # sums of at most 49 numbers below 5
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)
    return "answered"


@torch.no_grad()
def main(seed: int, cases: int, is_sanitized: bool) -> None:
    """Run the cases; the number of a failed one is printed before its error."""
    if is_sanitized:
        plain = cpu_library._command
        cpu_library._command = lambda source: [*plain(source), "-fsanitize=address"]
    assert cpu_kernels.library() is not None
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for number in range(cases):
        for run in (decode_case, linear_case):
            chance = random.Random(f"{seed} {number} {run.__name__}")
            torch.manual_seed(chance.randrange(1 << 32))
            try:
                counts[run.__name__, run(chance)] += 1
            except BaseException:
                print(f"{run.__name__}, seed {seed}, case {number}", file=sys.stderr)
                raise
    print(dict(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), "--asan" in sys.argv)
