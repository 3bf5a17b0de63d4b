"""Patches on attributes of objects, such as `model.generate`, that blocks share and leave in any order.

The first block that enters installs the patch; the last one that leaves restores the original. The patch object is the
attribute and holds all state. A subclass defines what the patch does. This module does not depend on models.
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
    """The running asyncio task, or else the thread. Blocks of one flow nest; blocks of two overlap in any order."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return task or threading.current_thread()


@dataclass(eq=False)
class Block:
    """An open block: an owner of a patch, with the flow that entered it."""

    flow: object = field(default_factory=current_flow)


B = TypeVar("B", bound=Block)
P = TypeVar("P", bound="Patch")


class Patch:
    """Replacement for `getattr(target, name)` while blocks are open.

    A copy or a pickle of the target made inside a block gets the original attribute, because no block would remove the
    patch from the copy.

    Attributes:
        inner: the original value, which may be another patch.
        owners: the open blocks, in the order in which they were entered.
    """

    def __init__(self, target: Any, name: str):
        self.target, self.name = target, name
        self.owners: list[Any] = []
        self._wrap(getattr(target, name, None), name in vars(target))

    def entered(self, owner: Any) -> None:
        """Called when a new owner has entered; does nothing by default."""

    def left(self) -> None:
        """Called when an owner has left; does nothing by default."""

    def __reduce__(self):
        return (_same, (self.inner,)) if self.is_own else (getattr, (self.target, self.name, None))

    def _wrap(self, inner: Any, is_own: bool) -> None:
        self.inner, self.is_own = inner, is_own
        self.__wrapped__ = inner  # transformers reads the signatures of forward and generate

    def _remove(self) -> None:
        """Restore the original. A patch that foreign code has wrapped stays in the wrapper and passes calls on."""
        attributes = vars(self.target)
        if attributes.get(self.name) is not self:
            for outer in _chain(self.target, self.name):
                if outer.inner is self:
                    outer._wrap(self.inner, self.is_own)
        elif self.is_own:
            attributes[self.name] = self.inner
        else:
            del attributes[self.name]


@contextmanager
def patched(target: Any, name: str, kind: type[P], owner: Block) -> Iterator[P]:
    """Keep a patch of this kind on `target.name` inside the block; an existing one is shared."""
    with _LOCK:
        patch = next((patch for patch in _chain(target, name) if type(patch) is kind), None) or kind(target, name)
        patch.owners.append(owner)
        if not any(found is patch for found in _chain(target, name)):  # new, or its last other block was just closed
            patch._wrap(getattr(target, name, None), name in vars(target))
            vars(target)[name] = patch
    try:
        with _LOCK:
            patch.entered(owner)
        yield patch
    finally:
        with _LOCK:
            patch.owners.remove(owner)
            try:
                patch.left()
            finally:
                if not patch.owners:
                    patch._remove()


def innermost(owners: Sequence[B], what: str) -> B | None:
    """The block that serves a call: the innermost one of this flow, or else the only open one.

    Raises:
        RuntimeError: several blocks are open and this flow entered none of them.
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


def _chain(target: Any, name: str) -> Iterator[Patch]:
    """The patches on an attribute, the outermost first."""
    patch = vars(target).get(name)
    while isinstance(patch, Patch):
        yield patch
        patch = patch.inner


def _same(value: Any) -> Any:
    return value
