"""DPG-Bench: 1065 long prompts, four images each, scored by yes/no questions to a VQA model.

The rules are those of the official script (TencentQQGYLab/ELLA, `dpg_bench/compute_dpg_bench.py`). The VQA models are
not its mPLUG, so results are named "DPG rules (VQA = ...)". Use them to compare cache policies, not with papers.
Prompts and questions are read from given paths; the package contains none.
"""

from ssd_cache.evaluation.dpg.export import DPGPictures
from ssd_cache.evaluation.dpg.prompts import read_prompts
from ssd_cache.evaluation.dpg.questions import Question, read_questions
from ssd_cache.evaluation.dpg.reading import DPGError
from ssd_cache.evaluation.dpg.rules import DPGScore, score_answers
from ssd_cache.evaluation.dpg.score import DPGResult, check_complete, score_sheets
from ssd_cache.evaluation.dpg.sheet import (
    PICTURES,
    check_sheets,
    cut_sheet,
    find_sheets,
    make_sheet,
    missing_sheets,
    write_sheet,
)
from ssd_cache.evaluation.dpg.vqa import BlipVQA, ChatVQA, VQAModel, load_vqa

__all__ = [
    "PICTURES",
    "BlipVQA",
    "ChatVQA",
    "DPGError",
    "DPGPictures",
    "DPGResult",
    "DPGScore",
    "Question",
    "VQAModel",
    "check_complete",
    "check_sheets",
    "cut_sheet",
    "find_sheets",
    "load_vqa",
    "make_sheet",
    "missing_sheets",
    "read_prompts",
    "read_questions",
    "score_answers",
    "score_sheets",
    "write_sheet",
]
