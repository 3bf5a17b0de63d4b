"""The exact benchmark: shapes-janus generates images of six kinds of captions, and the judge checks them.

It generates the images that have no result line yet, and writes one line per image. `ssd_cache.shapes.judge` decides
whether an image is correct. `bootstrap.py` computes the share of correct images, for each kind as in GenEval.
"""

from __future__ import annotations

from dataclasses import replace

from tqdm import tqdm

from ssd_cache.evaluation.conditions import hashed_seed
from ssd_cache.evaluation.records import Record
from ssd_cache.evaluation.results_folder import ResultsFolder
from ssd_cache.evaluation.runner import Plan, budget_name, digest_of
from ssd_cache.models import Checkpoint, Generator, GeneratorError, ResolvedSampling
from ssd_cache.runs.processes import Processes
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
            f"{checkpoint.name} generates {rows} x {columns} visual tokens out of {num_tokens}; the judge of shapes "
            f"reads {GRID[0]} x {GRID[1]} out of {len(PALETTE)}: give shapes-janus, or a model trained on its scenes"
        )


def shapes_prompts(num_per_kind: int, seed: int) -> list[tuple[str, str]]:
    """Captions of `make_prompts`, in an order that alternates the kinds, so that each batch contains all of them."""
    prompts = make_prompts(num_per_kind, seed)
    return [prompts[kind * num_per_kind + number] for number in range(num_per_kind) for kind in range(len(KINDS))]


def run_shapes(
    generator: Generator, plan: Plan, folder: ResultsFolder, sampling: ResolvedSampling, processes: Processes
) -> None:
    """Generate and judge this process's share of the images that have no line yet, one line per image.

    Args:
        generator: shapes-janus, or another model with the same grid and palette.
        plan: the images to generate.
        folder: the folder to write the lines to.
        sampling: guidance and temperature; the seeds are those of the plan.
        processes: the processes that share the plan; the main one shows a bar.

    Raises:
        ResultsError: a line cannot be written.
    """
    _, missing = plan.share(processes.index, processes.count, folder.done)
    num_tokens = plan.head_map.num_visual_tokens * sum(len(batch.prompts) for batch in missing)
    with tqdm(
        total=num_tokens, unit=" visual tokens", unit_scale=True, mininterval=5, disable=not processes.is_main
    ) as bar:
        for batch in missing:
            bar.set_description(f"{batch.policy.label} {budget_name(batch.budget)}", refresh=False)
            cache = plan.make_cache(batch.policy, batch.budget)
            prompts = [(index, *plan.prompts[index]) for index in batch.prompts]
            seeded = replace(sampling, seed=hashed_seed(batch.seed, batch.number))
            captions = [caption for _, _, caption in prompts]
            tokens = generator.generate(captions, cache, **vars(seeded), on_tokens=bar.update).cpu().numpy()
            verdicts = [judge(image, caption) for image, caption in zip(tokens, captions, strict=True)]
            folder.append(
                Record(
                    policy=batch.policy.label,
                    settings=plan.settings_of(batch.policy),
                    budget=batch.budget,
                    num_slots=cache.mean_slots,
                    head_map=digest_of(cache.head_map),
                    seed=batch.seed,
                    prompt=index,
                    kind=kind,
                    caption=caption,
                    correct=verdict.correct,
                    reason=verdict.reason,
                )
                for (index, kind, caption), verdict in zip(prompts, verdicts, strict=True)
            )
