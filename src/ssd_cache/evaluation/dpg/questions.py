"""Reads questions of DPG-Bench by item id from the official CSV, `dpg_bench.csv` of ELLA.

The file is read from a given path; the package does not contain it. `score.py` asks the questions.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ssd_cache.io.showing import ReadableError, first_names, shown
from ssd_cache.io.untrusted import read_text

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
"""Columns that are read. The file also has text, keywords, category_broad and category_detailed."""


@dataclass(frozen=True)
class Question:
    """One question about an image; the expected answer is always yes.

    Attributes:
        proposition_id: number of the question within the item, as text.
        text: the question.
        parents: ids of the questions of the same item that must count for this one to count; "0" (none) is omitted.
        broad, detailed: the category, for example ("attribute", "color"); `detailed` is empty for "global".
    """

    proposition_id: str
    text: str
    parents: tuple[str, ...]
    broad: str
    detailed: str

    @property
    def category(self) -> str:
        """The finer of the two category levels, for example "attribute - color"."""
        return f"{self.broad} - {self.detailed}" if self.detailed else self.broad


def read_questions(path: str | Path, *, official: bool = False) -> dict[str, tuple[Question, ...]]:
    """Read questions by item id; items and questions keep the order of the file.

    `official` reproduces two quirks of the official script. It skips row 0 after the header, so the first question of
    the file is omitted. It accepts questions whose parent is absent; scoring with `official=True` then drops their
    prompt.

    Raises:
        ValueError: a column is missing, a field is empty, an id is repeated, or, unless `official`, an item lacks a
            parent. The message names the file and row.
        OSError: the file cannot be read.
    """
    reader = csv.DictReader(io.StringIO(read_text(Path(path), newline=""), newline=""), strict=True)
    items: dict[str, dict[str, Question]] = {}
    try:
        names = list(reader.fieldnames or ())
        if missing := [name for name in COLUMNS if name not in names]:
            raise ReadableError(
                f"{path}: no column {', '.join(missing)}, only {first_names(names, 10)}; give ELLA's dpg_bench.csv"
            )
        for number, row in enumerate(reader, start=2):
            place = f"{path}, row {number}"
            if None in row or None in row.values():
                raise ReadableError(f"{place}: not {len(names)} fields as in row 1")
            if empty := [name for name in COLUMNS if not row[name].strip()]:
                raise ReadableError(f"{place}: {', '.join(empty)} is empty")
            question, questions = _question(row), items.setdefault(row["item_id"].strip(), {})
            if not question.broad:
                raise ReadableError(f"{place}: tuple {shown(row['tuple'])} begins with no category")
            if question.proposition_id in questions:
                raise ReadableError(
                    f"{place}: question {shown(question.proposition_id)} of item {shown(row['item_id'])} occurs twice"
                )
            questions[question.proposition_id] = question
    except csv.Error as error:
        raise ReadableError(f"{path}, line {reader.line_num}: {error}") from error
    if not items:
        raise ReadableError(f"{path} has no questions; give ELLA's dpg_bench.csv")
    if official:
        first = next(iter(items.values()))
        del first[next(iter(first))]
    for item_id, questions in items.items():
        if not official and (missing := missing_parents(questions.values())):
            raise ReadableError(
                f"{path}: questions of item {shown(item_id)} depend on {first_names(missing)}, which it lacks; give a "
                "complete file, or use official=True, which drops such prompts"
            )
    return {item_id: tuple(questions.values()) for item_id, questions in items.items() if questions}


def _question(row: dict[str, str]) -> Question:
    broad, _, detailed = row["tuple"].partition("(")[0].partition("-")
    return Question(
        row["proposition_id"].strip(),
        row["question_natural_language"].strip(),
        tuple(parent.strip() for parent in row["dependency"].split(",") if parent.strip() != "0"),
        broad.strip(),
        detailed.strip(" -"),  # ELLA writes "global - - (photo)"
    )


def missing_parents(questions: Collection[Question]) -> list[str]:
    """Ids of the parents that are not questions of the item, without duplicates."""
    known = {question.proposition_id for question in questions}
    return list(dict.fromkeys(p for question in questions for p in question.parents if p not in known))
