"""A data set of emoji: icons on plain backgrounds with captions, and a judge that finds the icon of an image exactly.

The icons are Google's Noto Emoji (Apache-2.0) and Microsoft's Fluent Emoji (MIT). No model is used here.
"""

from ssd_cache.emoji.captions import KINDS, make_prompts
from ssd_cache.emoji.icons import GRID, make_image
from ssd_cache.emoji.judge import Verdict, judge

__all__ = ["GRID", "KINDS", "Verdict", "judge", "make_image", "make_prompts"]
