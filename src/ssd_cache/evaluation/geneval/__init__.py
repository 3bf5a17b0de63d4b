"""GenEval by its own rules with transformers' detector: prompts, the folder of pictures, and their score.

The numbers are not official GenEval's, whose detector has other weights; results say "GenEval rules, HF detector".
Drawing the pictures is a generator's task, the command line's words are `cli`'s.
"""

from ssd_cache.evaluation.geneval.colors import ColorClassifier
from ssd_cache.evaluation.geneval.detector import Detector
from ssd_cache.evaluation.geneval.folder import NUM_SAMPLES, SampleFolder
from ssd_cache.evaluation.geneval.prompts import GenEvalPrompt, read_prompts
from ssd_cache.evaluation.geneval.rules import Detection, Rules
from ssd_cache.evaluation.geneval.score import score_folder, score_image
from ssd_cache.evaluation.geneval.summary import SCORER, GenEvalScore, ImageResult, summarize

__all__ = [
    "NUM_SAMPLES",
    "SCORER",
    "ColorClassifier",
    "Detection",
    "Detector",
    "GenEvalPrompt",
    "GenEvalScore",
    "ImageResult",
    "Rules",
    "SampleFolder",
    "read_prompts",
    "score_folder",
    "score_image",
    "summarize",
]
