"""Measures and plots the phenomena behind SSD on a model: where heads look, what they hold, where the prompt acts.

`analyze(model, prompt, head_map)` measures all of them, and `write_report` writes them as a page. Each phenomenon also
has a function that measures it and one that plots it. Figures need `pip install -e '.[plot]'`; measuring does not.
"""

from ssd_cache.analysis.attention import AttentionRecorder, HeadAttention, plot_attention
from ssd_cache.analysis.concentration import (
    Concentration,
    MarginTest,
    margin_test,
    plot_concentration,
    semantic_concentration,
)
from ssd_cache.analysis.report import as_json, write_report
from ssd_cache.analysis.retention import Retention, plot_retention, read_retention
from ssd_cache.analysis.scores import HeadScores, choose_heads, head_scores, plot_scores
from ssd_cache.analysis.study import Analysis, analyze

__all__ = [
    "Analysis",
    "AttentionRecorder",
    "Concentration",
    "HeadAttention",
    "HeadScores",
    "MarginTest",
    "Retention",
    "analyze",
    "as_json",
    "choose_heads",
    "head_scores",
    "margin_test",
    "plot_attention",
    "plot_concentration",
    "plot_retention",
    "plot_scores",
    "read_retention",
    "semantic_concentration",
    "write_report",
]
