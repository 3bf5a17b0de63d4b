"""DPG-Bench: 1065 long prompts, four images each, scored by yes/no questions to a VQA model.

The rules are those of the official script (TencentQQGYLab/ELLA, `dpg_bench/compute_dpg_bench.py`). The VQA models are
not its mPLUG, so results are named "DPG rules (VQA = ...)". Use them to compare cache policies, not with papers.
"""

from ssd_cache.evaluation.dpg.folder import (
    NUM_IMAGES,
    SheetFolder,
    cut_sheet,
    find_sheets,
    prompt_lines,
    read_prompts,
    write_sheet,
)
from ssd_cache.evaluation.dpg.questions import Question, read_questions
from ssd_cache.evaluation.dpg.score import DPGScore, check_complete, score_sheets

__all__ = [
    "NUM_IMAGES",
    "DPGScore",
    "Question",
    "SheetFolder",
    "check_complete",
    "cut_sheet",
    "find_sheets",
    "prompt_lines",
    "read_prompts",
    "read_questions",
    "score_sheets",
    "write_sheet",
]
