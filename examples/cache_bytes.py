"""Draw the bytes of a full cache and of a small one while an image is generated, as an animated SVG.

    python examples/cache_bytes.py docs/cache-bytes.svg

Both images are generated with the same seed, and the bytes are read from the caches after every visual token. The
animation stops where the reader's system asks for reduced motion. Text is black on white in any colour scheme.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import typer
from PIL import Image
from transformers import Cache, DynamicCache

from ssd_cache import SSDCache
from ssd_cache.models import BUNDLED, Generator, find_generator, find_head_map

WIDTH, SIDE, LEFT, RIGHT, TOP, CHART = 480, 208, 44, 436, 318, 140
"""Pixels: of the drawing, of an image, and the edges and height of the chart."""

SECONDS = 8
FULL, SMALL = "#0072B2", "#D55E00"
"""Blue and vermilion of Okabe and Ito: distinguishable with any colour vision."""

STYLE = f"""
text {{ font: 15px system-ui, sans-serif; fill: #1c1c20 }}
.small {{ font-size: 13px; fill: #55555c }}
.rows, .steps {{ animation: {SECONDS}s linear infinite }}
.rows {{ animation-name: rows; animation-timing-function: steps(24) }}
.steps {{ animation-name: steps }}
@keyframes rows {{ 0% {{ transform: scaleY(0) }} 80%, 100% {{ transform: scaleY(1) }} }}
@keyframes steps {{ 0% {{ transform: scaleX(0) }} 80%, 100% {{ transform: scaleX(1) }} }}
@media (prefers-reduced-motion: reduce) {{ .rows, .steps {{ animation: none }} }}
"""


def held_bytes(cache: Cache) -> int:
    """Bytes of K and V that a cache holds."""
    if isinstance(cache, SSDCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def generate(generator: Generator, cache: Cache, prompt: str, seed: int) -> tuple[Image.Image, list[int]]:
    """An image, and the bytes of the cache after each of its visual tokens."""
    held: list[int] = []
    tokens = generator.generate([prompt], cache, seed=seed, on_tokens=lambda number: held.append(held_bytes(cache)))
    return generator.to_images(tokens)[0], held


def embedded(image: Image.Image) -> str:
    """The image as a data URL, in the colours of a small palette."""
    content = io.BytesIO()
    image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).quantize(64).save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def image_of(name: str, left: int, image: Image.Image, caption: str, color: str) -> str:
    """An image that appears row by row, under its caption."""
    return f"""
<text x="{left}" y="56" style="fill:{color};font-weight:600">{escape(caption)}</text>
<rect x="{left}" y="66" width="{SIDE}" height="{SIDE}" fill="#dddde2"/>
<clipPath id="{name}"><rect class="rows" x="{left}" y="66" width="{SIDE}" height="{SIDE}"
 style="transform-origin:{left}px 66px"/></clipPath>
<image x="{left}" y="66" width="{SIDE}" height="{SIDE}" href="{embedded(image)}" clip-path="url(#{name})"/>"""


def line_of(held: Sequence[int], place: Callable[[int, float], tuple[float, float]], color: str) -> str:
    """The bytes over the visual tokens; points between others of the same height are left out."""
    kept = [
        index
        for index, value in enumerate(held)
        if index in (0, len(held) - 1) or not held[index - 1] == value == held[index + 1]
    ]
    kept = kept if len(kept) < 100 else [*kept[::8], len(held) - 1]
    points = " ".join("{:.1f},{:.1f}".format(*place(index, held[index])) for index in kept)
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="3" clip-path="url(#chart)"/>'


def draw(prompt: str, images: Sequence[Image.Image], held: Sequence[Sequence[int]], share: str) -> str:
    """The drawing: the image of the full cache and of the small one, and the bytes of both below."""
    full, small = held
    top = max(full)
    unit = 10 ** math.floor(math.log10(top))
    last = len(full) - 1

    def place(index: int, value: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * index / last, TOP + CHART * (1 - value / (1.08 * top))

    ticks = []
    for value in (0, unit // 2, unit):
        y = place(0, value)[1]
        ticks.append(
            f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddde2"/>'
            f'<text class="small" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value / 1e6:g}</text>'
        )
    words = (
        f"K and V of one image of {len(full)} visual tokens: the full cache grows to {max(full) / 1e6:.1f} MB, "
        f"one with a budget of {share} takes {max(small) / 1e6:.1f} MB"
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 500" role="img">
<title>{escape(words)}</title>
<style>{STYLE}</style>
<rect width="{WIDTH}" height="500" rx="8" fill="#fff"/>
<text x="24" y="30">{escape(prompt)}</text>
{image_of("first", 24, images[0], f"full cache, {max(full) / 1e6:.1f} MB", FULL)}
{image_of("second", WIDTH - 24 - SIDE, images[1], f"budget {share}, {max(small) / 1e6:.1f} MB", SMALL)}
<text class="small" x="24" y="302">K and V held, MB, by visual token</text>
{"".join(ticks)}
<clipPath id="chart"><rect class="steps" x="{LEFT}" y="{TOP - 9}" width="{RIGHT - LEFT}" height="{CHART + 18}"
 style="transform-origin:{LEFT}px 0"/></clipPath>
{line_of(full, place, FULL)}
{line_of(small, place, SMALL)}
<text class="small" x="{LEFT}" y="{TOP + CHART + 22}">1</text>
<text class="small" x="{RIGHT}" y="{TOP + CHART + 22}" text-anchor="end">{len(full)}</text>
</svg>
"""


def main(
    output: Path,
    prompt: str = "a photo of a red circle and a blue square",
    model: str = BUNDLED,
    budget: float = 0.2,
    seed: int = 0,
) -> None:
    """Generate PROMPT with a full cache and with BUDGET, and write the drawing of both to OUTPUT."""
    generator = find_generator(model).load()
    checkpoint = generator.checkpoint
    full = DynamicCache(config=checkpoint.family.text_config_of(checkpoint.config))
    caches = (full, SSDCache(find_head_map(model), budget))
    made = [generate(generator, cache, prompt, seed) for cache in caches]
    images, held = zip(*made, strict=True)
    output.write_text(draw(prompt, images, held, f"{budget:.0%}"), "utf-8")
    print(f"{output}: {len(held[0])} visual tokens, full cache {max(held[0])} bytes, {budget:.0%} {max(held[1])} bytes")


if __name__ == "__main__":
    typer.run(main)
