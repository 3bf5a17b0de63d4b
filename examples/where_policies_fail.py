"""Generate the same captions of shapes with several cache policies, and frame the images that are judged wrong.

    python examples/where_policies_fail.py --policies full,fitted,h2o --budget 0.2 --output failures.png

The captions are the first of each kind, not selected by result. One batch per policy, with the same seed for all.
"""

from __future__ import annotations

from pathlib import Path

import typer
from PIL import Image, ImageDraw

from ssd_cache.cli.files import check_output, save_image
from ssd_cache.cli.sheet import contact_sheet
from ssd_cache.evaluation.exact import SHAPES
from ssd_cache.evaluation.policies import budget_name, choose_head_map, parse_policies
from ssd_cache.models import find_generator, resolve_device, resolve_dtype
from ssd_cache.shapes import judge, make_prompts

WRONG = (200, 30, 30)


def framed(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """A copy with a frame inside its edge."""
    copy = image.convert("RGB")
    ImageDraw.Draw(copy).rectangle((0, 0, copy.width - 1, copy.height - 1), outline=color, width=copy.width // 32)
    return copy


def main(
    policies: str = "full,fitted:score=learned,fitted,ssd,linear,h2o,online,inverted,streaming-llm,margin",
    budget: float = 0.2,
    per_kind: int = 2,
    prompt_seed: int = 1,
    seed: int = 0,
    model: str = "shapes-janus",
    head_map: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    output: Path = Path("failures.png"),
) -> None:
    """Write a sheet with one row per policy, and print the errors of each image."""
    output = check_output(output)
    chosen = parse_policies(policies)
    where = resolve_device(device)
    checkpoint = find_generator(model)
    SHAPES.check_model(checkpoint)
    labels = choose_head_map(checkpoint, head_map, chosen)
    generator = checkpoint.load(resolve_dtype(dtype, where), where)
    captions = [caption for _, caption in make_prompts(per_kind, prompt_seed)]
    rows = {}
    for policy in chosen:
        own = policy.budgets([budget])[0]
        tokens = generator.generate(captions, policy.make_cache(labels, own), seed=seed)
        verdicts = [judge(image, caption) for image, caption in zip(tokens.cpu().numpy(), captions, strict=True)]
        images = [
            image if verdict.correct else framed(image, WRONG)
            for image, verdict in zip(generator.to_images(tokens), verdicts, strict=True)
        ]
        right = sum(verdict.correct for verdict in verdicts)
        rows[f"{policy.label}\n{budget_name(own)}\n{right} of {len(captions)} correct"] = images
        for caption, verdict in zip(captions, verdicts, strict=True):
            if not verdict.correct:
                print(f"{policy.label} {budget_name(own)}: {caption}: {verdict.reason}")
    save_image(contact_sheet(rows, captions, columns=len(captions)), output)
    print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
