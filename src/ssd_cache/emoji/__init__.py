"""A data set of emoji: icons on plain backgrounds with captions, and a judge that finds the icon of an image exactly.

emoji-janus, the small trained Janus in `checkpoint/`, generates such images; `ssd_cache.models` loads it. The icons are
Google's Noto Emoji (Apache-2.0) and Microsoft's Fluent Emoji (MIT). No model is used here.
"""

from ssd_cache.emoji.captions import KINDS, make_prompts
from ssd_cache.emoji.icons import GRID, NUM_TOKENS, make_image
from ssd_cache.emoji.judge import Verdict, judge

__all__ = ["GRID", "KINDS", "NUM_TOKENS", "Verdict", "judge", "make_image", "make_prompts"]
