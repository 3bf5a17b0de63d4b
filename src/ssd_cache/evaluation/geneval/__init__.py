"""GenEval by the rules of its authors, with transformers' detector: prompts, the image folder, and the score.

The results are not official GenEval scores, since the detector has other weights; they are labelled "GenEval rules, HF
detector".
"""

from ssd_cache.evaluation.geneval.colors import ColorClassifier
from ssd_cache.evaluation.geneval.detector import DETECTOR, Detector
from ssd_cache.evaluation.geneval.folder import NUM_SAMPLES, SampleFolder
from ssd_cache.evaluation.geneval.prompts import NUM_PROMPTS, GenEvalPrompt, read_prompts
from ssd_cache.evaluation.geneval.score import SCORER, GenEvalScore, score_folder

__all__ = [
    "DETECTOR",
    "NUM_PROMPTS",
    "NUM_SAMPLES",
    "SCORER",
    "ColorClassifier",
    "Detector",
    "GenEvalPrompt",
    "GenEvalScore",
    "SampleFolder",
    "read_prompts",
    "score_folder",
]
