"""The two benchmarks of the paper behind one interface: a share of the prompts, image folders, judge and score.

Rules, folders and judges are those of `evaluation`; `eval geneval` and `eval dpg` read and write the same folders.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ssd_cache.evaluation import dpg, geneval
from ssd_cache.evaluation.export import ImageSet
from ssd_cache.evaluation.scoring import RESULTS_FILE
from ssd_cache.evaluation.vqa import load_vqa
from ssd_cache.io.showing import ReadableError, first_names
from ssd_cache.models.find import find_folder
from ssd_cache.runs.run_state import ProfilingError

NUM_SAMPLES = geneval.NUM_SAMPLES
"""Images of each prompt, in both benchmarks."""

Entry = TypeVar("Entry")


def share_of(entries: Sequence[Entry], sample: float) -> list[Entry]:
    """A share of some entries, at least one, evenly spaced and in their order.

    Example:
        >>> share_of(range(80), 0.05)
        [10, 30, 50, 70]
    """
    number = max(1, round(sample * len(entries)))
    return [entries[(2 * index + 1) * len(entries) // (2 * number)] for index in range(number)]


def results_file(root: Path) -> Path:
    """The lines of results of a folder of images."""
    return root / "results" / RESULTS_FILE


class Benchmark(ABC):
    """A benchmark with the prompts that are used.

    Attributes:
        name: as in the commands of `eval`.
        captions: (tag, text) of every prompt.
        lines: the prompts as the text of a file.
        judges: names of the judges' models, by option.
        facts: settings that scores depend on, in addition to prompts and judges.
    """

    name: str
    captions: Sequence[tuple[str, str]]
    lines: str
    judges: dict[str, str]
    facts: dict[str, Any]

    @abstractmethod
    def images(self, root: Path, num_prompts: int | None = None) -> ImageSet:
        """The images of the first prompts, or of all."""

    @abstractmethod
    def _load(self, device: torch.device) -> Any:
        """The judge."""

    @abstractmethod
    def score(
        self, judge: Any, root: Path, num_prompts: int | None, keeps: bool, on_file: Callable[[], object]
    ) -> dict[str, float]:
        """Judge a folder, write its lines of results if `keeps`, and return its results by column."""

    def check_judges(self) -> None:
        """Refuse a judge that cannot be found; raises ValueError, or HubError."""
        for option, name in self.judges.items():
            if not (find_folder(name, f"--{option} {name}") / "config.json").is_file():
                raise ReadableError(f"--{option} {name}: no model there; give a folder with a config.json, or a Hub id")

    def load_judge(self, device: torch.device) -> Any:
        """Load the judge; raises ProfilingError."""
        try:
            return self._load(device)
        except (OSError, ImportError, ValueError) as error:
            names = ", ".join(f"--{option} {name}" for option, name in self.judges.items())
            raise ProfilingError(f"{names}: the judge of {self.name} cannot be loaded ({error})") from error


class GenEval(Benchmark):
    """GenEval: four images of each prompt, a detector and a CLIP."""

    name = "geneval"

    def __init__(self, prompts_file: Path, sample: float, detector: str, clip: str):
        """Read the prompts; a share is taken of each tag. Raises ValueError."""
        prompts = geneval.read_prompts(prompts_file)
        tags = dict.fromkeys(prompt.tag for prompt in prompts)
        of_tags = ([prompt for prompt in prompts if prompt.tag == tag] for tag in tags)
        self.prompts = [prompt for of_tag in of_tags for prompt in share_of(of_tag, sample)]
        self.captions = [(prompt.tag, prompt.prompt) for prompt in self.prompts]
        self.lines = "".join(f"{prompt.to_json()}\n" for prompt in self.prompts)
        self.judges, self.facts = {"detector": detector, "clip": clip}, {}

    def images(self, root: Path, num_prompts: int | None = None) -> geneval.SampleFolder[geneval.GenEvalPrompt]:
        return geneval.SampleFolder(root, self.prompts[:num_prompts])

    def _load(self, device: torch.device) -> tuple[geneval.Detector, geneval.ColorClassifier]:
        detector = geneval.Detector.from_pretrained(self.judges["detector"], device=device)
        return detector, geneval.ColorClassifier.from_pretrained(self.judges["clip"], device=device)

    def score(
        self, judge: Any, root: Path, num_prompts: int | None, keeps: bool, on_file: Callable[[], object]
    ) -> dict[str, float]:
        place = results_file(root) if keeps else None
        found = geneval.score_folder(self.images(root, num_prompts), *judge, results_file=place, on_image=on_file)
        return {**found.tags, "overall": found.overall, "standard_error": found.standard_error}


class DPGBench(Benchmark):
    """DPG-Bench: a sheet of four images of each prompt, and a VQA model."""

    name = "dpg"

    def __init__(self, folder: Path, sample: float, vqa: str):
        """Read prompts and questions from ELLA's folder `dpg_bench`; raises ValueError."""
        places = [folder / "prompts", folder / "prompts.jsonl"]
        place, questions = next((one for one in places if one.exists()), None), folder / "dpg_bench.csv"
        if place is None or not questions.is_file():
            missing = questions.name if place is not None else "prompts, as a folder or as prompts.jsonl"
            raise ReadableError(f"{folder} has no {missing}; give the folder dpg_bench of TencentQQGYLab/ELLA")
        prompts = dpg.read_prompts(place)
        self.prompts = {item_id: prompts[item_id] for item_id in share_of(list(prompts), sample)}
        asked = dpg.read_questions(questions)
        if unknown := [item_id for item_id in self.prompts if item_id not in asked]:
            raise ReadableError(f"{questions} has no question of {first_names(unknown)}; give a complete file")
        self.questions = {item_id: asked[item_id] for item_id in self.prompts}
        self.captions, self.lines = list(self.prompts.items()), dpg.prompt_lines(self.prompts)
        self.judges = {"vqa": vqa}
        self.facts = {"questions_sha256": hashlib.sha256(repr(self.questions).encode()).hexdigest()}

    def images(self, root: Path, num_prompts: int | None = None) -> dpg.SheetFolder:
        return dpg.SheetFolder(root, dict(self.captions[:num_prompts]))

    def _load(self, device: torch.device) -> Any:
        return load_vqa(self.judges["vqa"], device=device)

    def score(
        self, judge: Any, root: Path, num_prompts: int | None, keeps: bool, on_file: Callable[[], object]
    ) -> dict[str, float]:
        found = dpg.score_sheets(
            root,
            self.questions,
            judge,
            item_ids=list(self.prompts)[:num_prompts],
            results_file=results_file(root) if keeps else None,
            on_sheet=on_file,
        )
        return {**found.level1, "overall": found.overall, "standard_error": found.standard_error}
