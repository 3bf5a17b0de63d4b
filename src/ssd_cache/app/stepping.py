"""`PausedGeneration`: the model's own `generate` in a thread that pauses after every row of the image.

Several of them take turns, also those of several visitors: only one thread computes at a time, so each one's speed is
that of a run alone. The tokens are those of `Generator.generate` with the same seed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers import Cache

from ssd_cache.models import Generator

_ONE_AT_A_TIME = threading.RLock()
"""Held while a generation computes or ends: all of them share torch's random numbers."""


class _Thread(threading.Thread):
    """Runs a generation, while the thread that called `step` or `close` holds the lock for it."""


class StoppedError(Exception):
    """Ends a generation from within."""


class PausedGeneration:
    """One image that is generated row by row. Call `close` at the end, also after an error.

    Args:
        generator: the model.
        prompt: the text of the image.
        cache: a new cache.
        seed: as for `Generator.generate`.
        is_stopped: called at every token; the generation ends when it returns True.

    Attributes:
        cache: the cache; None after `close`.
        tokens: visual tokens generated so far, `[tokens]`, on the CPU.
        has_ended: whether the image is finished or was stopped.
        row: the batch row of the prompt; with guidance, another row has none.
        seconds: time that the last step took.
    """

    def __init__(self, generator: Generator, prompt: str, cache: Cache, seed: int, is_stopped: Callable[[], bool]):
        self._generator, self._prompt, self._seed, self._is_stopped = generator, prompt, seed, is_stopped
        self.row = int(generator.is_unconditional(1).long().argmin())  # the conditional row
        self.cache: Cache | None = cache
        self.tokens = torch.empty(0, dtype=torch.int64)
        self.has_ended, self.seconds = False, 0.0
        self._parts: list[torch.Tensor] = []
        self._num_steps, self._is_closed = 0, False
        self._error: BaseException | None = None
        self._turn, self._turn_over = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = _Thread(target=self._run, name="ssd-cache-app", daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Run the prompt at the first call, and one row at every other; raises what the generation raised."""
        with self._alone():
            started = time.perf_counter()
            self._turn.release()
            self._turn_over.acquire()
            if self._parts:
                self.tokens = torch.cat(self._parts).cpu()  # waits for the device
            self.seconds = time.perf_counter() - started
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the generation and release the cache."""
        with self._alone():
            self._is_closed = True
            self._turn.release()
            self._thread.join()
        self.cache = self._error = None

    def _run(self) -> None:
        embeddings = self._generator.visual_embeddings
        handle = embeddings.register_forward_pre_hook(self._see_token)
        try:
            self._pause()
            tokens = self._generator.generate([self._prompt], self.cache, seed=self._seed, on_tokens=self._see_step)
            self._parts = [tokens[0]]
        except StoppedError:
            pass
        except Exception as error:
            self._error = error
        finally:
            handle.remove()
            self.has_ended = True
            self._turn_over.release()

    def _see_token(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Remember a token that the model generated; the model also embeds prompts, and tokens of other threads."""
        if threading.current_thread() is self._thread and args[0].shape[1] == 1:
            self._parts.append(args[0][self.row])

    def _see_step(self, number: int) -> None:
        """Called once after the prompt, and once after every token but the last, which is then stored."""
        if self._num_steps % self._generator.checkpoint.grid[1] == 0:
            self._pause(ends_turn=True)
        self._num_steps += 1
        if self._is_closed or self._is_stopped():
            raise StoppedError

    def _pause(self, ends_turn: bool = False) -> None:
        with self._own_random_state():  # saved before the other thread goes on and sets its own
            if ends_turn:
                self._turn_over.release()
            self._turn.acquire()
        if self._is_closed:
            raise StoppedError

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """In the block, no other generation computes, and afterwards torch's random state is as before."""
        # the garbage collector may close a generation in the thread of another one, for which the lock is held already
        is_held = isinstance(threading.current_thread(), _Thread)
        with nullcontext() if is_held else _ONE_AT_A_TIME, self._own_random_state():
            yield

    def _own_random_state(self) -> AbstractContextManager:
        """After the block, torch's global generators are as before: several threads use them in turn."""
        device = self._generator.model.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
