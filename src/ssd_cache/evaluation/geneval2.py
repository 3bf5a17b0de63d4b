"""GenEval 2 by the rules of its authors: prompts with a question for every atom, and Soft-TIFA scores of their images.

A chat model answers every question in one word, and the probability of the right word is the question's score. Source:
github.com/facebookresearch/GenEval2 (Kamath et al., arXiv 2512.16853), reimplemented from its rules. Its prompts are
licensed for non-commercial use (CC BY-NC 4.0); they are read from a given path, and the package contains none.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ssd_cache.evaluation import bootstrap
from ssd_cache.evaluation.geneval import SampleFolder
from ssd_cache.evaluation.scoring import ROUNDING, judge_files, wrong_line
from ssd_cache.evaluation.vqa import ChatVQA
from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import checked, read_json_lines

Skill = Literal["object", "attribute", "count", "position", "verb"]

NUM_PROMPTS = 800
"""Number of prompts in the official file."""

JUDGE = "Qwen/Qwen3-VL-8B-Instruct"
"""The official VQA model."""

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class GenEval2Prompt:
    """One line of the prompt file.

    Attributes:
        prompt: the text to generate from.
        atom_count: its atomicity. Questions about "a" do not count as atoms, so there may be more questions.
        vqa_list: (question, right answer) pairs.
        skills: the skill that each question tests.
    """

    prompt: str
    atom_count: int
    vqa_list: tuple[tuple[str, str], ...]
    skills: tuple[Skill, ...]

    def __post_init__(self) -> None:
        if not self.prompt.strip() or not self.vqa_list:
            raise ReadableError("prompt or vqa_list is empty")
        if len(self.skills) != len(self.vqa_list):
            raise ReadableError(f"{len(self.vqa_list)} questions have {len(self.skills)} skills")
        for question, answer in self.vqa_list:
            if is_count(question) and answer not in NUMBERS:
                raise ReadableError(f"{shown(question)} has the answer {shown(answer)}, expected one to ten in words")

    def to_json(self) -> str:
        """The line of the prompt file, without its line end."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class GenEval2Score:
    """The score of a folder; all scores are from 0 to 100.

    Attributes:
        soft_tifa_gm: mean over prompts of the geometric mean of their questions' probabilities: the official score.
        soft_tifa_am: the same with the arithmetic mean.
        gm_error, am_error: their standard errors, see `bootstrap.standard_error`.
        skills: mean probability of the questions of each skill that occurs.
        atomicities: `soft_tifa_gm` of the prompts of each atomicity.
        num_prompts, num_images: what was scored.
        judge: the scorer and its settings.
    """

    soft_tifa_gm: float
    soft_tifa_am: float
    gm_error: float
    am_error: float
    skills: dict[str, float]
    atomicities: dict[int, float]
    num_prompts: int
    num_images: int
    judge: dict[str, Any]


def read_prompts(path: str | Path) -> list[GenEval2Prompt]:
    """Read the prompts of a file in the format of geneval2_data.jsonl, one JSON object per line.

    Raises:
        ValueError: the file has no prompts, or a line is invalid; the message has its number, from 1.
        OSError: the file cannot be read.
    """
    prompts = []
    for place, line in read_json_lines(Path(path)):
        try:
            prompts.append(checked(GenEval2Prompt, line))
        except ValueError as error:
            raise ReadableError(f"{place}: {error}; give a line of GenEval 2's geneval2_data.jsonl") from error
    if not prompts:
        raise ReadableError(f"{path}: no prompt in it; give lines of GenEval 2's geneval2_data.jsonl")
    return prompts


def is_count(question: str) -> bool:
    """Whether the answer to a question is a number; all other questions are answered with yes."""
    return question.startswith("How many")


def right_answers(question: str, answer: str) -> list[str]:
    """Spellings of the right answer whose probabilities are summed, as in the official script.

    >>> right_answers("How many dogs are in the image?", "two")
    ['two', 'Two', '2', ' two', ' Two', ' 2']
    """
    words = [answer, answer.capitalize(), str(NUMBERS.index(answer) + 1)] if is_count(question) else ["yes", "Yes"]
    return [blank + word for blank in ("", " ") for word in words]


def score_folder(
    folder: SampleFolder[GenEval2Prompt],
    vqa: ChatVQA,
    *,
    results_file: str | Path | None = None,
    on_image: Callable[[], object] | None = None,
) -> GenEval2Score:
    """Ask every question about every image of a complete folder.

    Args:
        folder: the images and their prompts; GenEval 2 has one image per prompt.
        vqa: the model that answers, as from `load_vqa`.
        results_file: file of JSON lines, one per image, with the probability of each right answer. If it exists, its
            images are not judged again, except those that have changed.
        on_image: called after every image, for a progress bar.

    Raises:
        ValueError: the folder is incomplete, an image cannot be read, or the file is damaged or holds results of
            another run.
        OSError: the file cannot be written.
    """
    folder.check_complete()
    judge = {"benchmark": "GenEval 2", "scorer": f"GenEval 2 rules (VQA = {vqa.name})"}
    files = []
    for number in range(len(folder.texts)):
        known = {"filename": folder.name(number), "tag": "prompts", "metadata": folder.prompt_of(number).to_json()}
        files.append((folder.path(number), known))

    def ask(number: int, image: Image.Image) -> dict[str, Any]:
        pairs = folder.prompt_of(number).vqa_list
        texts = [f"{question} Answer in one word." for question, _ in pairs]
        probabilities = vqa.probabilities(image, texts, [right_answers(*pair) for pair in pairs])
        return {"probabilities": probabilities, "result": 100 * geometric_mean(probabilities)}

    lines = judge_files(files, ask, judge, results_file, on_image, {"probabilities": list[float]})
    prompts = [folder.prompt_of(number) for number in range(len(lines))]
    for prompt, line in zip(prompts, lines, strict=True):
        found = line["probabilities"]
        if len(found) != len(prompt.vqa_list) or not all(0 <= value <= 1 + ROUNDING for value in found):
            raise wrong_line(results_file, line, f"has no probability for each of {len(prompt.vqa_list)} questions")
    return summarize(prompts, lines)


def summarize(prompts: Sequence[GenEval2Prompt], lines: Sequence[Mapping[str, Any]]) -> GenEval2Score:
    """Compute the score of some images from their prompts and their lines of results."""
    by_skill: dict[str, list[float]] = {}
    geometric: dict[GenEval2Prompt, list[float]] = {}
    arithmetic: dict[GenEval2Prompt, list[float]] = {}
    for prompt, line in zip(prompts, lines, strict=True):
        probabilities = line["probabilities"]
        geometric.setdefault(prompt, []).append(100 * geometric_mean(probabilities))
        arithmetic.setdefault(prompt, []).append(100 * statistics.fmean(probabilities))
        for skill, probability in zip(prompt.skills, probabilities, strict=True):
            by_skill.setdefault(skill, []).append(100 * probability)
    gm, am = ({"prompts": {prompt: statistics.fmean(of[prompt]) for prompt in of}} for of in (geometric, arithmetic))
    by_atomicity: dict[int, list[float]] = {}
    for prompt, value in gm["prompts"].items():
        by_atomicity.setdefault(prompt.atom_count, []).append(value)
    return GenEval2Score(
        soft_tifa_gm=bootstrap.mean(gm),
        soft_tifa_am=bootstrap.mean(am),
        gm_error=bootstrap.standard_error(gm),
        am_error=bootstrap.standard_error(am),
        skills={skill: statistics.fmean(by_skill[skill]) for skill in sorted(by_skill)},
        atomicities={count: statistics.fmean(by_atomicity[count]) for count in sorted(by_atomicity)},
        num_prompts=len(gm["prompts"]),
        num_images=len(lines),
        judge=lines[0]["judge"],
    )


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of numbers from 0 to 1; 0 if one of them is 0."""
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if all(values) else 0.0
