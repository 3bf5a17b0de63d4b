"""The fuzz tests together read as many inputs as CONTRIBUTING.md and SECURITY.md say, shared out in `fuzzing.py`."""

from __future__ import annotations

from pathlib import Path

from helpers.fuzzing import INPUTS, TOTAL


def test_all_kinds_together_have_the_number_that_the_documents_say():
    assert sum(INPUTS.values()) == TOTAL == 10_000
    assert min(INPUTS.values()) >= 1


def test_every_kind_is_read_by_a_test():
    """A test of a kind that is not listed fails, so the list has to name no other."""
    texts = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in INPUTS if f'"{name}"' not in texts] == []
