"""GenEval by its own rules with transformers' detector: prompts, the folder of pictures, and their score.

The numbers are not official GenEval's, whose detector has other weights; results say "GenEval rules, HF detector".
Drawing the pictures is a generator's task, the command line's words are `cli`'s.
"""

from ssd_cache.evaluation.geneval.colors import ColorClassifier
from ssd_cache.evaluation.geneval.detector import DETECTOR, Detector
from ssd_cache.evaluation.geneval.export import GenEvalPictures
from ssd_cache.evaluation.geneval.folder import NUM_SAMPLES, SampleFolder
from ssd_cache.evaluation.geneval.prompts import NUM_PROMPTS, GenEvalPrompt, read_prompts
from ssd_cache.evaluation.geneval.rules import Detection, Rules
from ssd_cache.evaluation.geneval.score import score_folder, score_image
from ssd_cache.evaluation.geneval.summary import SCORER, GenEvalScore, ImageResult, summarize

__all__ = [
    "DETECTOR",
    "NUM_PROMPTS",
    "NUM_SAMPLES",
    "SCORER",
    "ColorClassifier",
    "Detection",
    "Detector",
    "GenEvalPictures",
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
