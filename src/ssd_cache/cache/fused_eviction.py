"""Evict in one call: a Triton kernel on a GPU, a C++ loop on a CPU; by torch where there is none, or if it errs.

The CPU loop is used once the attention of an image has loaded the library, so an eviction never waits for a compiler.
Before its first use on a device, a kernel must leave in random slots the tokens that `eviction.py` leaves. A kernel
also ranks by a learned score, so that a store is scored and evicted in one call. This module has no rule of its own.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssd_cache.cache.eviction import compact, select_victims
from ssd_cache.head_map.learned_score import LearnedScore
from ssd_cache.io.showing import first_line
from ssd_cache.kernels import cpu_loops, dispatch
from ssd_cache.kernels.checks import DTYPES, PLAIN


@dataclass(frozen=True)
class Slots:
    """The tensors of full slots, changed in place.

    Attributes:
        positions: `[batch, heads, num_slots]`, int32.
        received: `[batch, num_scored, num_slots]`, float32, of the first heads: the attention that each token received,
            or its worth. Freed slots get zero.
        states: K and V, or their codes, `[batch, heads, num_prompt + num_slots, head_dim]`; codes have no prompt.
        scales: of codes, `[batch, heads, num_slots]`, float32, else empty.
    """

    positions: torch.Tensor
    received: torch.Tensor
    states: list[torch.Tensor]
    scales: list[torch.Tensor]

    @property
    def num_prompt(self) -> int:
        """Columns of `states` before the slots."""
        return self.states[0].shape[2] - self.positions.shape[2]


@dataclass(frozen=True)
class Ranks:
    """How the semantic heads of a store rank their tokens.

    Attributes:
        by_torch: returns the ranks, `[batch, num_semantic, num_slots]`, float32, or None if no head is semantic.
        learned: the learned score of the semantic heads, if they rank by one; a kernel can then rank instead. It also
            computes the worth of new tokens, in `Slots.received`.
        first_new: the first slot whose worth is not yet there.
    """

    by_torch: Callable[[], torch.Tensor | None]
    learned: LearnedScore | None = None
    first_new: int = 0


def evict(slots: Slots, ranks: Ranks, num_evict: int, num_seen: int, **spared: int) -> None:
    """Drop tokens from full slots and move the others to the front; free slots get the next tokens' positions.

    Args:
        slots: the tensors of a store.
        ranks: of its tokens.
        num_evict, num_seen: as for `select_victims`.
        spared: `num_recent` and `num_sinks` of `select_victims`.
    """
    # subclasses of tensors, as torch's fake ones, may have no data at their address
    is_plain = all(type(tensor) in PLAIN for tensor in (slots.positions, *slots.states))
    run = _by_kernel if is_plain and has_kernel(slots.positions.device) else _by_torch
    run(slots, ranks, num_evict, num_seen, **spared)


def _by_torch(slots: Slots, ranks: Ranks, num_evict: int, num_seen: int, **spared: int) -> None:
    positions, received = slots.positions, slots.received
    victims = select_victims(positions, ranks.by_torch(), num_evict, num_seen, **spared)
    views = [states[:, :, slots.num_prompt :] for states in slots.states]
    compact([*views, *slots.scales, positions, received], victims)
    free = slice(positions.shape[2] - num_evict, None)
    received[..., free].zero_()
    positions[:, :, free].copy_(torch.arange(num_seen, num_seen + num_evict, device=positions.device))


def _by_kernel(slots: Slots, ranks: Ranks, num_evict: int, num_seen: int, **spared: int) -> None:
    takes_loops = dispatch.takes_loops(slots.positions.device)
    if takes_loops:
        launch = cpu_loops.evict
    else:
        from ssd_cache.kernels.triton_evict import launch

    counts = {"num_prompt": slots.num_prompt, "num_evict": num_evict, "num_seen": num_seen, **spared}
    given = slots.received, slots.states, slots.scales, counts
    learned, (dtype, of_values) = ranks.learned, (states.dtype for states in slots.states)
    # torch ranks codes, and under autocast also K and V of two dtypes
    if learned is None or dtype != of_values or dtype not in (cpu_loops.DECODERS if takes_loops else DTYPES):
        launch(slots.positions, ranks.by_torch(), *given)
    else:
        counts["first_new"] = ranks.first_new
        launch(slots.positions, None, *given, (learned.key, learned.value, learned.row, learned.column))


def has_kernel(device: torch.device) -> bool:
    """Whether a kernel evicts on a device: it is there, and leaves in 45 slots what torch leaves.

    Warns:
        UserWarning: once, if the kernel should run there and fails or errs.
    """
    is_there = cpu_loops.is_loaded() if dispatch.takes_loops(device) else dispatch.has_triton(device)
    try:
        return is_there and _passes_trial(device)
    except torch.OutOfMemoryError:  # memory is full now; the next eviction tries again
        return False


@functools.cache
def _passes_trial(device: torch.device) -> bool:
    try:
        failed = "" if _agree(device) else "it keeps other tokens"
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # compilers and drivers raise many unrelated classes
        failed = first_line(failure)
    if failed:
        warnings.warn(f"torch evicts on this {device.type} instead of ssd-cache's kernel: {failed}", stacklevel=2)
    return not failed


def _agree(device: torch.device) -> bool:
    """Whether kernel and torch do the same to three heads, two of them semantic, in two rows; many ranks are equal.

    By a learned score, the ranks have different roundings, so these differ.
    """
    num_slots, num_evict, num_seen, random = 45, 12, 90, torch.Generator().manual_seed(0)
    held = torch.stack([torch.randperm(num_seen, generator=random)[:num_slots] for _ in range(6)])
    positions = held.int().view(2, 3, num_slots)
    positions[1, 2] = positions[0, 2]  # a spatial head holds the same tokens in every row
    given = torch.randint(5, (2, 2, num_slots), generator=random).float().to(device)
    states = [torch.randn(2, 3, 7 + num_slots, 5, generator=random).bfloat16() for _ in range(2)]
    shapes = {"key": (2, 5), "value": (2, 5), "row": (2, 10, 10), "column": (2, 10, 9)}
    score = LearnedScore.of({name: torch.randn(shape, generator=random) for name, shape in shapes.items()}).to(device)
    for num_received, learned in ((1, None), (2, score)):
        received = torch.rand(2, num_received, num_slots, generator=random)
        results = []
        for run in (_by_torch, _by_kernel):
            tensors = [tensor.to(device, copy=True) for tensor in (positions, received, *states)]
            slots = Slots(tensors[0], tensors[1], tensors[2:], [])
            ranks = (
                Ranks(lambda: given) if learned is None else _ranks_by(learned, slots, num_seen, num_slots - num_evict)
            )
            run(slots, ranks, num_evict, num_seen, num_recent=9, num_sinks=4)
            kept = slice(7 + num_slots - num_evict)
            results.append([tensors[0], *(states[:, :, kept] for states in tensors[2:]), tensors[1]])
        (*exact, worth), (*found, other) = results
        if not (all(map(torch.equal, exact, found)) and torch.allclose(worth, other, rtol=1e-4, atol=1e-4)):
            return False
    return True


def _ranks_by(learned: LearnedScore, slots: Slots, num_seen: int, first_new: int) -> Ranks:
    """Ranks by a learned score, for the first heads of slots in a model's dtype."""

    def by_torch() -> torch.Tensor:
        heads = slots.received.shape[1]
        new = [states[:, :heads, slots.num_prompt + first_new :] for states in slots.states]
        slots.received[..., first_new:] = learned.of_states(*new)
        return learned.of_places(slots.positions[:, :heads], num_seen) + slots.received

    return Ranks(by_torch, learned, first_new)
