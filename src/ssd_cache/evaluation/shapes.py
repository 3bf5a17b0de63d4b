"""The exact benchmark: shapes-janus generates images of six kinds of captions, and the judge checks them.

It generates the images that have no result line yet, and writes one line per image. `ssd_cache.shapes.judge` decides
whether an image is correct. `bootstrap.py` computes the share of correct images, for each kind as in GenEval.
"""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

from ssd_cache.evaluation.conditions import draw_seed
from ssd_cache.evaluation.policies import mean_slots
from ssd_cache.evaluation.records import Record
from ssd_cache.evaluation.results_folder import ResultsFolder
from ssd_cache.evaluation.runner import Batch, Plan, budget_name, digest_of
from ssd_cache.models import Checkpoint, Generator, GeneratorError
from ssd_cache.shapes import GRID, KINDS, PALETTE, judge, make_prompts


def check_model(checkpoint: Checkpoint) -> None:
    """Refuse a model whose images the judge cannot read.

    Raises:
        GeneratorError: the grid or the number of visual tokens differs from the judge's.
    """
    num_tokens = checkpoint.config.vq_config.num_embeddings
    if checkpoint.grid != GRID or num_tokens != len(PALETTE):
        rows, columns = checkpoint.grid
        raise GeneratorError(
            f"{checkpoint.name} draws {rows} x {columns} visual tokens out of {num_tokens}; the judge of shapes reads "
            f"{GRID[0]} x {GRID[1]} out of {len(PALETTE)}: give shapes-janus, or a model that was trained on its scenes"
        )


def shapes_prompts(num_per_kind: int, seed: int) -> list[tuple[str, str]]:
    """Captions of `make_prompts`, in an order that alternates the kinds, so that each batch contains all of them."""
    prompts = make_prompts(num_per_kind, seed)
    return [prompts[kind * num_per_kind + number] for number in range(num_per_kind) for kind in range(len(KINDS))]


def run_shapes(
    generator: Generator,
    plan: Plan,
    folder: ResultsFolder,
    *,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    process: int = 0,
    num_processes: int = 1,
    progress: bool = True,
) -> None:
    """Generate and judge this process's share of the images that have no line yet, one line per image.

    Args:
        generator: shapes-janus, or another model with the same grid and palette.
        plan: the images to generate.
        folder: the folder to write the lines to.
        guidance_scale: the checkpoint's own when not given.
        temperature: the checkpoint's own when not given.
        process: this process's number, from 0.
        num_processes: number of processes that share the plan.
        progress: show a bar over visual tokens.

    Raises:
        ResultsError: a line cannot be written.
    """
    own, missing = plan.share(process, num_processes, folder.done)
    num_cells = plan.head_map.num_visual_tokens
    total, left = (sum(len(batch.prompts) for batch in part) for part in (own, missing))
    with tqdm(
        total=total * num_cells,
        initial=(total - left) * num_cells,
        unit=" visual tokens",
        unit_scale=True,
        mininterval=5,
        disable=not progress,
    ) as bar:
        for batch in missing:
            bar.set_description(f"{batch.policy.label} {budget_name(batch.budget)}", refresh=False)
            folder.append(_draw(generator, plan, batch, guidance_scale, temperature, bar.update))


def _draw(
    generator: Generator,
    plan: Plan,
    batch: Batch,
    guidance_scale: float | None,
    temperature: float | None,
    on_tokens: Callable[[int], object],
) -> list[Record]:
    """Generate one batch and judge it."""
    cache = plan.make_cache(batch.policy, batch.budget)
    pictures = generator.generate(
        [plan.prompts[index][1] for index in batch.prompts],
        cache,
        guidance_scale=guidance_scale,
        temperature=temperature,
        seed=draw_seed(batch.seed, batch.number),
        on_tokens=on_tokens,
    )
    tokens = pictures.cpu().numpy()
    verdicts = [judge(picture, plan.prompts[index][1]) for index, picture in zip(batch.prompts, tokens, strict=True)]
    return [
        Record(
            policy=batch.policy.label,
            settings=plan.settings_of(batch.policy),
            budget=batch.budget,
            num_slots=mean_slots(cache),
            head_map=digest_of(cache.head_map),
            seed=batch.seed,
            prompt=index,
            kind=plan.prompts[index][0],
            caption=plan.prompts[index][1],
            correct=verdict.correct,
            reason=verdict.reason,
        )
        for index, verdict in zip(batch.prompts, verdicts, strict=True)
    ]
