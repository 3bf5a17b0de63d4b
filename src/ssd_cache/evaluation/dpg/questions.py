"""Reads questions of DPG-Bench by item id, from the official CSV or from a re-packed file of the Hub, by path.

Both formats give the same `Question`s. `rules.py` scores the answers.
"""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_cache.evaluation.dpg.reading import DPGError, as_id, as_text, field, json_rows, read_text
from ssd_cache.io.showing import printable, shown

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
"""Columns read from the official CSV. It also has text, keywords, category_broad and category_detailed."""


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


Row = tuple[str, str, Question]
"""Location of the question in its file, item id, and question."""


def read_questions(path: str | Path, *, official: bool = False) -> dict[str, tuple[Question, ...]]:
    """Read questions by item id; items and questions keep the order of the file.

    Args:
        path: `dpg_bench.csv` of ELLA; or a re-packed file with one row per item, `{item_id, questions:
            [{proposition_id, question, dependency, category_broad, category_detailed}]}`, as .jsonl, .json, or
            .parquet (needs pyarrow).
        official: reproduce two quirks of the official script. It skips row 0 after the header, so the first question
            of the file is omitted. It accepts questions whose parent is absent; scoring with `official=True` then
            drops their prompt. Some re-packed files were made after the first question was lost: their first item
            names a parent that it lacks. No further question is omitted from such files.

    Raises:
        DPGError: a column is missing, a field is empty, a (item_id, proposition_id) is repeated, or, unless
            `official`, an item lacks a parent. The message names the file and line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    rows = list(_rows(path))
    if not rows:
        raise DPGError(f"{path} has no questions: give DPG-Bench's question file")
    places: dict[tuple[str, str], str] = {}
    for where, item_id, question in rows:
        key = (item_id, question.proposition_id)
        if key in places:
            raise DPGError(
                f"{where}: question {shown(key[1])} of item {shown(item_id)} stands in {places[key]} already; take "
                "one out"
            )
        places[key] = where
    if official:
        if path.suffix.lower() == ".csv" or not any(item_id == rows[0][1] for _, item_id, _ in _orphans(rows)):
            rows = rows[1:]
    else:
        for where, item_id, question in _orphans(rows):
            raise DPGError(
                f"{where}: question {shown(question.proposition_id)} of item {shown(item_id)} depends on "
                f"{printable(', '.join(question.parents), 200)}, and not all of them are questions of that item; "
                "mend the row, take a complete question file, or pass official=True, which drops such prompts"
            )
    items: dict[str, list[Question]] = {}
    for _, item_id, question in rows:
        items.setdefault(item_id, []).append(question)
    return {item_id: tuple(questions) for item_id, questions in items.items()}


def _orphans(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the questions with a parent that their item lacks."""
    rows = list(rows)
    known = {(item_id, question.proposition_id) for _, item_id, question in rows}
    for where, item_id, question in rows:
        if any((item_id, parent) not in known for parent in question.parents):
            yield where, item_id, question


def _rows(path: Path) -> Iterator[Row]:
    match path.suffix.lower():
        case ".csv":
            return _csv_rows(path)
        case ".json" | ".jsonl":
            return _repack_rows(json_rows(path))
        case ".parquet":
            return _repack_rows(_parquet_rows(path))
    raise DPGError(f"{path} is no question file by its name; give a .csv, .jsonl, .json or .parquet")


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        found = ", ".join(reader.fieldnames or ()) or "nothing"
        raise DPGError(
            f"{path}, line 1: no column {', '.join(missing)}, only {printable(found, 400)}; give ELLA's dpg_bench.csv"
        )
    line = reader.line_num + 1
    while True:
        where = f"{path}, line {line}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DPGError(f"{where}: {error}; mend the quotes of that row") from error
        line = reader.line_num + 1  # line of the next row: a quoted field may span several lines
        if None in row or None in row.values():
            raise DPGError(f"{where}: not {len(reader.fieldnames or ())} fields as in line 1; mend the row")
        category = as_text(row["tuple"], "tuple", where).partition("(")[0]
        broad, _, detailed = category.partition("-")
        yield _row(where, row["item_id"], row, row["question_natural_language"], broad, detailed)


def _repack_rows(items: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Row]:
    for where, item in items:
        questions = field(item, "questions", where)
        if not isinstance(questions, list) or not questions or not all(isinstance(one, Mapping) for one in questions):
            raise DPGError(f"{where}: 'questions' is no list of objects, or an empty one; give one object a question")
        for number, question in enumerate(questions, start=1):
            place = f"{where}, question {number}"
            broad, detailed = (field(question, f"category_{level}", place) for level in ("broad", "detailed"))
            if not isinstance(detailed, str):
                raise DPGError(f"{place}: category_detailed is {shown(detailed)}; give a text, '' or '-' for none")
            text = field(question, "question", place)
            yield _row(place, field(item, "item_id", place), question, text, broad, detailed)


def _row(where: str, item_id: object, row: Mapping[str, Any], text: object, broad: object, detailed: str) -> Row:
    proposition_id = as_id(field(row, "proposition_id", where), "proposition_id", where)
    dependency = as_id(field(row, "dependency", where), "dependency", where)
    parents = [parent.strip() for parent in dependency.split(",")]
    if "" in parents or proposition_id == "0":
        raise DPGError(
            f"{where}: proposition_id {shown(proposition_id)} with dependency {shown(dependency)}; ids count from 1, "
            "and a dependency is ids with commas between them, or 0 for none"
        )
    question = Question(
        proposition_id,
        as_text(text, "the question", where),
        tuple(parent for parent in parents if parent != "0"),
        as_text(broad, "the category", where),
        detailed.strip(" -"),  # ELLA writes "global - - (photo)"
    )
    return where, as_id(item_id, "item_id", where), question


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DPGError(f"{path} needs pyarrow, which is not installed: install it, or convert to .jsonl") from error
    for number, row in enumerate(parquet.read_table(path).to_pylist(), start=1):
        yield f"{path}, row {number}", row
