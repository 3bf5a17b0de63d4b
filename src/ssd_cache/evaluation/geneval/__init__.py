"""GenEval by its own rules with transformers' detector: prompts, the image folder, and the score.

The results are not official GenEval scores, since the detector has other weights; they are labelled "GenEval rules, HF
detector". Generating the images is not done here; the command line is in `cli`.
"""

from ssd_cache.evaluation.geneval.colors import ColorClassifier
from ssd_cache.evaluation.geneval.detector import DETECTOR, Detector
from ssd_cache.evaluation.geneval.folder import NUM_SAMPLES, SampleFolder
from ssd_cache.evaluation.geneval.prompts import NUM_PROMPTS, GenEvalPrompt, read_prompts
from ssd_cache.evaluation.geneval.score import score_folder
from ssd_cache.evaluation.geneval.summary import SCORER, GenEvalScore, ImageResult, summarize

__all__ = [
    "DETECTOR",
    "NUM_PROMPTS",
    "NUM_SAMPLES",
    "SCORER",
    "ColorClassifier",
    "Detector",
    "GenEvalPrompt",
    "GenEvalScore",
    "ImageResult",
    "SampleFolder",
    "read_prompts",
    "score_folder",
    "summarize",
]
