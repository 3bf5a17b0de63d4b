"""Several tokens that take their slots at once are stored like tokens that arrive one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_cache.cache.plans import GroupPlan
from ssd_cache.cache.quantized import QuantizedStore
from ssd_cache.cache.scorers import make_scorer
from ssd_cache.cache.slots import SlotStore


def make_store(buffer: int, num_slots: int, kv_dtype: str | None) -> SlotStore:
    plan = GroupPlan((0, 1), 0, num_slots, buffer, num_recent=0, num_sinks=1, scorer=make_scorer("sum", 6, None))
    prompt = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    store = (
        SlotStore(plan, prompt, prompt) if kv_dtype is None else QuantizedStore(plan, prompt, prompt, kv_dtype=kv_dtype)
    )
    store.begin(prompt, prompt, None)
    return store


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@settings(deadline=None, max_examples=40)
@given(buffer=st.integers(1, 5), extra=st.integers(2, 6), counts=st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_several_tokens_are_stored_like_tokens_one_by_one(kv_dtype, buffer, extra, counts):
    together, one_by_one = (make_store(buffer, buffer + extra, kv_dtype) for _ in range(2))
    random = torch.Generator().manual_seed(0)
    for count in counts:
        room = buffer - (together.num_stored - together.plan.num_slots) % buffer
        if count > room:
            with pytest.raises(ValueError, match=f"n={count} tokens at once: give 1 to {room}"):
                together.reserve(count)
            continue
        keys, values = torch.randn(2, 2, 2, count, 8, generator=random)
        together.write(together.reserve(count), keys, values)
        for key, value in zip(keys.split(1, 2), values.split(1, 2), strict=True):
            one_by_one.write(one_by_one.reserve(), key, value)
        assert together.num_seen == one_by_one.num_seen
        for name in (*together.STATES, "positions"):
            assert torch.equal(getattr(together, name), getattr(one_by_one, name)), name


def test_no_token_cannot_take_a_slot():
    with pytest.raises(ValueError, match="n=0 tokens at once: give 1 to"):
        make_store(2, 4, None).reserve(0)
