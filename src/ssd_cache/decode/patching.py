"""Patches on attributes of objects, such as `model.generate`, that blocks share and leave in any order.

The first block that enters installs the patch, the last one that leaves restores what was there. All state lives in
the patch itself, which is the attribute. What a patch does is up to its subclass; this module knows no models.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

_LOCK = threading.RLock()  # re-entrant, since the garbage collector may close an abandoned block at any point


def current_flow() -> object:
    """The running asyncio task, or else the thread: blocks of one nest, those of two overlap in any order."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return task or threading.current_thread()


@dataclass(eq=False)
class Block:
    """A block that is open: one owner of a patch, and the flow that entered it."""

    flow: object = field(default_factory=current_flow)


B = TypeVar("B", bound=Block)
P = TypeVar("P", bound="Patch")


class Patch:
    """What stands in place of `getattr(target, name)` while blocks are open.

    A copy or a pickle of the target made inside a block gets the original attribute, since no block would ever remove
    the patch from it.

    Attributes:
        inner: the value before, which may be another patch.
        owners: the open blocks, in the order in which they were entered.
    """

    def __init__(self, target: Any, name: str):
        self.target, self.name = target, name
        self.owners: list[Any] = []
        self._set_inner(getattr(target, name, None), name in vars(target))

    def _set_inner(self, inner: Any, is_own: bool) -> None:
        self.inner, self.is_own = inner, is_own
        self.__wrapped__ = inner  # transformers reads the signatures of forward and generate

    def entered(self, owner: Any) -> None:
        """Set up what a new owner needs."""

    def left(self) -> None:
        """Undo what no owner needs any more."""

    def __reduce__(self):
        return (_same, (self.inner,)) if self.is_own else (getattr, (self.target, self.name, None))


def _same(value: Any) -> Any:
    return value


@contextmanager
def patched(target: Any, name: str, kind: type[P], owner: Block) -> Iterator[P]:
    """Have a patch of this kind on `target.name` inside the block, the one that is there already if there is one."""
    patch = _enter(target, name, kind, owner)
    try:
        with _LOCK:
            patch.entered(owner)
        yield patch
    finally:
        _leave(patch, owner)


def _chain(target: Any, name: str) -> Iterator[Patch]:
    """The patches on an attribute, the outermost first."""
    patch = vars(target).get(name)
    while isinstance(patch, Patch):
        yield patch
        patch = patch.inner


def _enter(target: Any, name: str, kind: type[P], owner: Block) -> P:
    with _LOCK:
        while True:
            patch = next((patch for patch in _chain(target, name) if type(patch) is kind), None)
            if patch is None:
                patch = kind(target, name)
                vars(target)[name] = patch
            patch.owners.append(owner)
            if any(found is patch for found in _chain(target, name)):
                return patch
            patch.owners.remove(owner)  # the garbage collector has closed its last other block meanwhile


def _leave(patch: Patch, owner: Block) -> None:
    with _LOCK:
        patch.owners.remove(owner)
        try:
            patch.left()
        finally:
            if not patch.owners:
                _remove(patch)


def _remove(patch: Patch) -> None:
    """Take a patch out of its chain; one that foreign code has wrapped stays inside it, and passes calls on."""
    attributes = vars(patch.target)
    if attributes.get(patch.name) is not patch:
        for outer in _chain(patch.target, patch.name):
            if outer.inner is patch:
                outer._set_inner(patch.inner, patch.is_own)
    elif patch.is_own:
        attributes[patch.name] = patch.inner
    else:
        del attributes[patch.name]


def innermost(owners: Sequence[B], what: str) -> B | None:
    """The block that serves a call: the innermost of this flow, or else the only one that is open.

    Raises:
        RuntimeError: this flow entered none, and several are open.
    """
    owners, flow = list(owners), current_flow()
    for block in reversed(owners):
        if block.flow is flow:
            return block
    if len(owners) > 1:
        raise RuntimeError(
            f"{len(owners)} {what} blocks are open on this model and this thread or task entered none of them: it is "
            f"not clear which applies: enter {what}(...) where the model is called, or share one block"
        )
    return owners[0] if owners else None
