"""DPG-Bench: 1065 long prompts, four images each, scored by yes/no questions to a VQA model.

The rules are those of the official script (TencentQQGYLab/ELLA, `dpg_bench/compute_dpg_bench.py`). The VQA models are
not its mPLUG, so results are named "DPG rules (VQA = ...)". Use them to compare cache policies, not with papers.
Prompts and questions are read from given paths; the package contains none.
"""

from ssd_cache.evaluation.dpg.prompts import read_prompts
from ssd_cache.evaluation.dpg.questions import Question, read_questions
from ssd_cache.evaluation.dpg.rules import DPGScore
from ssd_cache.evaluation.dpg.score import check_complete, score_sheets
from ssd_cache.evaluation.dpg.sheet import NUM_IMAGES, SheetFolder, cut_sheet, find_sheets, write_sheet
from ssd_cache.evaluation.dpg.vqa import VQAModel, load_vqa

__all__ = [
    "NUM_IMAGES",
    "DPGScore",
    "Question",
    "SheetFolder",
    "VQAModel",
    "check_complete",
    "cut_sheet",
    "find_sheets",
    "load_vqa",
    "read_prompts",
    "read_questions",
    "score_sheets",
    "write_sheet",
]
