"""Reads questions of DPG-Bench by item id, from the official CSV or from a re-packed file of the Hub, by path.

Both formats give the same `Question`s. `rules.py` scores the answers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ssd_cache.io.showing import ReadableError, first_names, shown
from ssd_cache.io.untrusted import checked_fields, read_json_lines

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
"""Columns read from the official CSV. It also has text, keywords, category_broad and category_detailed."""

FIELDS = {
    "proposition_id": int | str,
    "question": str,
    "dependency": int | str,
    "category_broad": str,
    "category_detailed": str,
}
"""Fields of a question in a re-packed file."""


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

    Args:
        path: `dpg_bench.csv` of ELLA; or JSON lines of a re-packed file, one item a line, `{item_id, questions:
            [{proposition_id, question, dependency, category_broad, category_detailed}]}`.
        official: reproduce two quirks of the official script. It skips row 0 after the header, so the first question
            of the file is omitted. It accepts questions whose parent is absent; scoring with `official=True` then
            drops their prompt. Some re-packed files were made after the first question was lost: their first item
            names a parent that it lacks. No further question is omitted from such files.

    Raises:
        ValueError: a column is missing, a field is empty, an id is repeated, or, unless `official`, an item lacks a
            parent. The message names the file and row.
        OSError: the file cannot be read.
    """
    path = Path(path)
    is_csv = path.suffix.lower() == ".csv"
    items: dict[str, dict[str, Question]] = {}
    for place, row in _csv_rows(path) if is_csv else _json_rows(path):
        question = _question(place, row)
        questions = items.setdefault(row["item_id"], {})
        if question.proposition_id in questions:
            raise ReadableError(
                f"{place}: question {shown(question.proposition_id)} of item {shown(row['item_id'])} occurs twice"
            )
        questions[question.proposition_id] = question
    if not items:
        raise ReadableError(f"{path} has no questions; give DPG-Bench's question file")
    if official:
        first = next(iter(items.values()))
        if is_csv or not missing_parents(first.values()):
            del first[next(iter(first))]
    else:
        for item_id, questions in items.items():
            if missing := missing_parents(questions.values()):
                raise ReadableError(
                    f"{path}: questions of item {shown(item_id)} depend on {first_names(missing)}, which it lacks; "
                    "give a complete file, or use official=True, which drops such prompts"
                )
    return {item_id: tuple(questions.values()) for item_id, questions in items.items() if questions}


def missing_parents(questions: Collection[Question]) -> list[str]:
    """Ids of the parents that are not questions of the item, without duplicates."""
    known = {question.proposition_id for question in questions}
    return list(dict.fromkeys(p for question in questions for p in question.parents if p not in known))


def _question(place: str, row: dict[str, str]) -> Question:
    """The question of a row with `item_id` and `FIELDS`, all texts."""
    if empty := [name for name, value in row.items() if not value.strip() and name != "category_detailed"]:
        raise ReadableError(f"{place}: {', '.join(empty)} is empty")
    return Question(
        row["proposition_id"].strip(),
        row["question"].strip(),
        tuple(parent.strip() for parent in row["dependency"].split(",") if parent.strip() != "0"),
        row["category_broad"].strip(),
        row["category_detailed"].strip(" -"),  # ELLA writes "global - - (photo)"
    )


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every row with its place; row 1 is the header."""
    reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
    names = list(reader.fieldnames or ())
    if missing := [name for name in COLUMNS if name not in names]:
        raise ReadableError(
            f"{path}: no column {', '.join(missing)}, only {first_names(names, 10)}; give ELLA's dpg_bench.csv"
        )
    try:
        for number, row in enumerate(reader, start=2):
            if None in row or None in row.values():
                raise ReadableError(f"{path}, row {number}: not {len(names)} fields as in row 1")
            broad, _, detailed = row["tuple"].partition("(")[0].partition("-")
            yield (
                f"{path}, row {number}",
                {
                    "item_id": row["item_id"].strip(),
                    "proposition_id": row["proposition_id"],
                    "question": row["question_natural_language"],
                    "dependency": row["dependency"],
                    "category_broad": broad,
                    "category_detailed": detailed,
                },
            )
    except csv.Error as error:
        raise ReadableError(f"{path}, line {reader.line_num}: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every question of a re-packed file with its place."""
    for place, item in read_json_lines(path):
        try:
            checked_fields({"item_id": int | str, "questions": list[dict]}, item)
            for question in item["questions"]:
                checked_fields(FIELDS, question)
        except ValueError as error:
            raise ReadableError(f"{place}: {error}") from error
        for question in item["questions"]:
            row = {name: str(question[name]) for name in FIELDS}
            yield place, {"item_id": str(item["item_id"]).strip(), **row}
