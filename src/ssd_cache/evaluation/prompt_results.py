"""Reads the result of every prompt from the files of `eval geneval score` and `eval dpg score`.

A file is read completely or refused with the line at fault, since a difference is meaningful only over complete sets.
Nothing is judged again; `comparing.py` compares the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_cache.io.showing import ReadableError, differences, shown
from ssd_cache.io.untrusted import checked_fields, read_json_lines

RESULTS_FILE = "results.jsonl"

GENEVAL, DPG = "GenEval", "DPG-Bench"

REMEDY = f"give a complete {RESULTS_FILE} of `ssd-cache eval geneval score` or `ssd-cache eval dpg score`"

GENEVAL_LINE = {
    **dict.fromkeys(("filename", "tag", "metadata", "scorer"), str),
    **dict.fromkeys(("correct", "readable"), bool),
    "settings": dict,
}
DPG_LINE = {"item_id": str, "answers": list[list[int | bool]], "score": float}
"""Fields of one image of GenEval, and of one prompt of DPG-Bench; the lines may have others."""


@dataclass(frozen=True)
class PromptResults:
    """The content of one results file; `judge` names the judge and its settings, `num_images` is per prompt.

    `strata` has results by prompt, by stratum: for GenEval its tags, 0 to 1; for DPG-Bench "prompts", 0 to 100. The key
    of a prompt contains everything that its images are judged on.
    """

    path: Path
    benchmark: str
    judge: dict[str, Any]
    strata: dict[str, dict[str, float]]
    num_images: int

    @property
    def prompts(self) -> set[tuple[str, str]]:
        """Stratum and prompt of all results."""
        return {(stratum, prompt) for stratum, results in self.strata.items() for prompt in results}


def read_prompt_results(path: str | Path) -> PromptResults:
    """Read the results of a file, or of the `results.jsonl` in a folder.

    Raises:
        ValueError: no such file, a file that no scorer wrote, a damaged or incomplete line, an image that the scorer
            could not read, or prompts with unequal numbers of images.
    """
    path = Path(path)
    if path.is_dir():
        path /= RESULTS_FILE
    try:
        lines = read_json_lines(path)
        first = lines[0][1] if lines else {}
        if "official" in first:
            return _read(path, DPG, lines[1:], first)
        if "scorer" in first:
            return _read(path, GENEVAL, lines, _geneval_judge(first))
        raise ReadableError(f"{path}: no results of single prompts of GenEval or DPG-Bench in it")
    except OSError as error:
        raise ReadableError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    except ValueError as error:
        raise ReadableError(f"{error}; {REMEDY}") from error


def _read(path: Path, benchmark: str, lines: list[tuple[str, dict[str, Any]]], judge: dict[str, Any]) -> PromptResults:
    """Group images by stratum and prompt. Of two lines about one image, or one sheet, the later one counts."""
    read_line, name = (_geneval_images, "filename") if benchmark == GENEVAL else (_dpg_images, "item_id")
    images: dict[str, dict[str, dict[str, float]]] = {}
    for place, row in {str(row.get(name)): (place, row) for place, row in lines}.values():
        try:
            stratum, prompt, found = read_line(row, judge)
        except ValueError as error:
            raise ReadableError(f"{place}: {error}") from error
        images.setdefault(stratum, {}).setdefault(prompt, {}).update(found)
    numbers = sorted({len(found) for prompts in images.values() for found in prompts.values()})
    if len(numbers) != 1:  # else the mean over prompts would not be the mean over images
        what = f"{numbers[0]} to {numbers[-1]} images of a prompt" if numbers else "no result of a prompt"
        raise ReadableError(f"{path}: {what}; run the score command to its end")
    strata = {
        stratum: {prompt: sum(found.values()) / len(found) for prompt, found in prompts.items()}
        for stratum, prompts in images.items()
    }
    return PromptResults(path, benchmark, judge, strata, numbers[0])


def _geneval_judge(row: dict[str, Any]) -> dict[str, Any]:
    settings = row.get("settings")
    return {"scorer": row["scorer"], **(settings if isinstance(settings, dict) else {})}


def _geneval_images(row: dict[str, Any], judge: dict[str, Any]) -> tuple[str, str, dict[str, float]]:
    """Tag, prompt and result of one image, see `geneval.ImageResult`."""
    checked_fields(GENEVAL_LINE, row)
    if differing := differences(judge, _geneval_judge(row), ("before", "here")):
        raise ReadableError(f"another judge than in the lines before ({differing})")
    if not row["readable"]:
        raise ReadableError(f"the scorer could not read {shown(row['filename'])}")
    return row["tag"], row["metadata"], {row["filename"]: float(row["correct"])}


def _dpg_images(row: dict[str, Any], judge: dict[str, Any]) -> tuple[str, str, dict[str, float]]:
    """The results of the images of one sheet, see `dpg.score_sheets`: their mean for each."""
    if "unreadable" in row:
        raise ReadableError(f"the scorer could not read the sheet of {shown(row.get('item_id'))}")
    checked_fields(DPG_LINE, row)
    num_questions = len(row["answers"][0]) if row["answers"] else 0  # a re-packed prompt file may have lost one
    results = {str(number): 100 * row["score"] for number in range(len(row["answers"]))}
    return "prompts", f"{row['item_id']} ({num_questions} questions)", results
