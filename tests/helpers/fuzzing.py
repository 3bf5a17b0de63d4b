"""Runs a reader on many hostile inputs, each from its own seed, and checks that it reads or refuses every one.

`INPUTS` shares 10,000 inputs among all kinds; `FUZZ_MUTATIONS` is another number of inputs of all kinds together.
`FUZZ_ONLY` is the number of the one input to try again, as a failure prints it.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.hostile import mutant
from ssd_cache.io.showing import ReadableError

TOTAL = 10_000
MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", TOTAL))
ONLY = os.environ.get("FUZZ_ONLY")

LONGEST = 2200
"""Characters of a message: 2000 of the library's own, and what a caller puts around it."""

SECONDS, BYTES = 10.0, 1 << 30
"""Limits of one input: seconds of the processor, and bytes of address space beside those at the start.
A mutated file has at most a few megabytes."""

INPUTS = {
    # test_app.py
    "request of a visitor": 773,
    "row and heads of a visitor": 150,
    "request of a visitor to the page": 50,
    "headers of a request": 200,
    # test_head_maps.py
    "config.json, loaded": 550,
    "config.json, used": 70,
    "config.json, inspected": 14,
    "head_map.safetensors, loaded": 550,
    "head_map.safetensors, used": 70,
    "head_map.safetensors, inspected": 14,
    # test_pages.py
    "parts of a page": 70,
    "report of a bench with foreign text": 70,
    "report of shapes": 70,
    "report of scores": 70,
    "card": 140,
    "page of a preparation": 14,
    # test_prompts.py
    "prompts.txt": 400,
    "prompts.jsonl": 400,
    "prompts of a checkpoint": 280,
    "prompts of GenEval": 210,
    "prompts of GenEval 2": 210,
    "prompts of DPG": 280,
    "a prompt of DPG": 70,
    "questions of DPG": 340,
    "official questions of DPG": 340,
    "captions": 210,
    "checksums": 280,
    # test_results.py
    "run.json": 210,
    "lines of shapes": 140,
    "settings of images": 400,
    "answers of DPG": 280,
    "probabilities of GenEval 2": 280,
    "results of images": 280,
    "compared results": 140,
    "metadata of GenEval": 210,
    "list of captions": 400,
    "image file": 280,
    "scores of a reproduction": 340,
    "report of a bench": 340,
    # test_states.py
    "state of profile": 210,
    "state of learn": 140,
    "state of fit": 35,
    "state of fidelity": 70,
    "check of a preparation": 70,
    "plan of a preparation": 280,
}
"""Inputs of each kind, `TOTAL` together. A kind whose inputs take long has few."""

GENEVAL2_ROW = {
    "prompt": "a dog and two cars",
    "atom_count": 2,
    "vqa_list": [["Is there a dog ?", "Yes"], ["How many cars ?", "two"]],
    "skills": ["object", "count"],
}
"""A row of a file of GenEval 2 prompts."""


class WouldWork(Exception):
    """The input was accepted, and the work would begin."""


@dataclass
class Outcome:
    """How many inputs were read, and how many refused."""

    accepted: int = 0
    refused: int = 0


def fuzz(
    name: str,
    attempt: Callable[[random.Random], Any],
    *,
    errors: tuple[type[Exception], ...] = (ReadableError,),
    named: str = "",
) -> Outcome:
    """Try as many inputs as `INPUTS` has of a kind; `attempt` makes each from its seed, and returns or raises.

    Args:
        name: the kind of input, in `INPUTS`; the seed depends on it and on the number.
        attempt: may raise `errors` whose messages are the library's own, or `WouldWork`.
        errors: what reading documents.
        named: a text that every message must hold, such as the name of the file.
    """
    outcome = Outcome()
    numbers = [int(ONLY)] if ONLY else range(max(1, round(MUTATIONS * INPUTS[name] / TOTAL)))
    with _bounded_memory():
        for number in numbers:
            try:
                with _bounded_time():
                    attempt(random.Random(f"{name} {number}"))
                outcome.accepted += 1
            except WouldWork:
                outcome.accepted += 1
            except errors as error:
                outcome.refused += 1
                _check_message(error, named, name, number)
            except BaseException as error:
                error.add_note(_replay(name, number))
                raise
    return outcome


def fuzz_file(
    name: str,
    path: Path,
    read: Callable[[], Any],
    *,
    errors: tuple[type[Exception], ...] = (ReadableError,),
    prepare: Callable[[], None] = lambda: None,
    names_file: bool = True,
) -> Outcome:
    """Put hostile versions of the file at `path` in its place and read each; a refused file must stay as it is.

    `prepare` is called before each is read, for example to give it its checksum. Other arguments are as for `fuzz`.
    """
    good = path.read_bytes()

    def attempt(chance: random.Random) -> None:
        path.write_bytes(mutant(good, chance))
        prepare()
        written = path.read_bytes()
        try:
            read()
        except errors:
            assert path.read_bytes() == written, "a file that is refused stays as it is"
            raise

    outcome = fuzz(name, attempt, errors=errors, named=path.name if names_file else "")
    if not ONLY:
        path.write_bytes(good)
    return outcome


def check_both(outcome: Outcome, least: float = 0.02) -> None:
    """Require that of many inputs some were read and some refused: neither all harmless nor all nonsense."""
    total = outcome.accepted + outcome.refused
    if total >= 100:
        assert min(outcome.accepted, outcome.refused) >= least * total, outcome


def _check_message(error: Exception, named: str, name: str, number: int) -> None:
    message, place = str(error), _replay(name, number)
    assert isinstance(error, ReadableError), f"{type(error).__name__}: {message[:300]!r}; {place}"
    assert message.encode(), place
    assert len(message) <= LONGEST, f"{len(message)} characters; {place}"
    assert all(char.isprintable() or char == "\n" for char in message), f"{message!r}; {place}"
    assert named in message, f"{message!r} does not name {named}; {place}"


def _replay(name: str, number: int) -> str:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    return f"input {number} of {name!r}; to try it again: FUZZ_ONLY={number} pytest '{test}'"


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let allocations fail above `BYTES` beside what the process holds, where the system can limit them."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    held = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _bounded_time() -> Iterator[None]:
    """Fail after `SECONDS` of the processor; a busy machine does not count."""

    def fail(*_: object) -> None:
        pytest.fail(f"it takes more than {SECONDS:g} s")

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
