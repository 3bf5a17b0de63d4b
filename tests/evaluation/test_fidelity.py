"""Fidelity to the full cache: every number against plain loops, exact zeros where nothing is evicted, and the command.

Small models with random weights, with and without guidance and shared KV heads. What a trained model shows is told in
docs/fidelity.md, not tested.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.models import BOI, BOS, PAD, tiny_janus, tiny_llama
from helpers.reference import ReferenceHead
from helpers.tiny_checkpoint import HEADS, LAYERS, SIDE, head_map, load_example, write_checkpoint
from PIL import Image
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationConfig,
    JanusForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from typer.testing import CliRunner

from ssd_cache import HeadMap, HeadMapError, SSDCache
from ssd_cache._compat import CACHE
from ssd_cache.cli import app
from ssd_cache.evaluation.fidelity import Fidelity, draw_fidelity, measure, measure_fidelity
from ssd_cache.kernels import dispatch
from ssd_cache.layout import ImageLayout
from ssd_cache.models import Checkpoint, Generator, GeneratorError, find_generator, generator_of
from ssd_cache.runs.run_state import ProfilingError

PROMPTS = ["a photo of a red circle", "a photo of a circle left of a blue square"]  # of unlike length: left padding
GRID, CELLS = (6, 6), 36
STEPS = CELLS - 1


class TextGenerator(Generator):
    """A Llama whose text stands for visual tokens: no guidance, and the head that all its tokens share."""

    @classmethod
    def load(cls, checkpoint, dtype, device):
        raise NotImplementedError("tests bring the model")

    def prepare(self, prompts):
        width = max(map(len, prompts))
        ids = [[PAD] * (width - len(text)) + [10 + ord(letter) % 50 for letter in text] for text in prompts]
        mask = [[0] * (width - len(text)) + [1] * len(text) for text in prompts]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def call_arguments(self, inputs, sampling):
        return {"max_new_tokens": CELLS, "top_k": 0}

    def is_unconditional(self, num_prompts):
        return torch.zeros(num_prompts, dtype=torch.bool)

    def to_images(self, tokens):
        return [Image.new("RGB", (8, 8)) for _ in tokens]


def make_generator(family):
    if family == "text":
        model = tiny_llama(layers=2, heads=4, kv_heads=2, seed=1)
        model.generation_config = GenerationConfig(bos_token_id=BOS, pad_token_id=PAD)
        return TextGenerator(Checkpoint("text", "", model.config, TextGenerator, GRID), model, None)
    model = tiny_janus(heads=4 if family == "grouped" else 2, grid_side=GRID[0], seed=1)
    if family == "grouped":
        config = copy.deepcopy(model.config)
        config.text_config.num_key_value_heads = 2
        torch.manual_seed(1)
        model = JanusForConditionalGeneration(config).eval()
        model.generation_config = GenerationConfig(
            bos_token_id=BOS, eos_token_id=2, pad_token_id=PAD, generation_kwargs={"boi_token_id": BOI}
        )
    return generator_of(model, load_example().build_processor())


LABELS = torch.tensor([[True, False], [False, True]])
SETTINGS = {
    "ssd": {"budget": {"spatial": 14, "semantic": 10}, "buffer": 4, "num_recent": 2, "num_sinks": 1},
    "every step": {"budget": 12, "buffer": 1, "num_recent": 3},
}


# --- every number, from plain loops


class PlainAttention:
    """An attention function that takes all K and V and looks at what `ReferenceHead`s keep, one row and head at a time.

    `outputs[step][layer]` is the attention's output, `[rows, heads * head_dim]`; `heads[layer][row][kv_head]` are the
    reference's, with the weights that they gave.
    """

    def __init__(self, make_head):
        self.make_head = make_head
        self.heads, self.outputs, self.kept, self.seen = {}, [], [], None

    def __call__(self, module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        rows, _, new, _ = query.shape
        layer, num_kv = module.layer_idx, key.shape[1]
        if layer not in self.heads:
            self.num_prompt = new
            self.seen = [[True] * new] * rows if attention_mask is None else attention_mask[:, 0, -1, :new].tolist()
            self.heads[layer] = [[self.make_head(layer, head) for head in range(num_kv)] for _ in range(rows)]
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if layer == 0:
            self.outputs.append({})
            self.kept.append({})
        output = torch.zeros(rows, query.shape[1], query.shape[3], dtype=query.dtype)
        groups = query.shape[1] // num_kv
        for row in range(rows):
            for head in range(num_kv):
                reference = self.heads[layer][row][head]
                mine = slice(head * groups, (head + 1) * groups)
                result = reference.step(
                    query[row, mine, 0].tolist(),
                    key[row, head, -1].tolist(),
                    value[row, head, -1].tolist(),
                    key[row, head, : self.num_prompt].tolist(),
                    value[row, head, : self.num_prompt].tolist(),
                    self.seen[row],
                    scaling,
                )
                output[row, mine] = torch.tensor(result, dtype=query.dtype)
                self.kept[-1][layer, row, head] = list(reference.kept)
        self.outputs[-1][layer] = output.flatten(1)
        return output[:, None], None


def plain_run(generator, monkeypatch, feeds, make_head):
    """Log-scores `[rows, vocabulary]` at every step, and the attention behind them."""
    attention = PlainAttention(make_head)
    monkeypatch.setitem(AttentionInterface._global_mapping, "plain", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "plain", sdpa_mask)
    model, cache, scores = generator.model, DynamicCache(), []
    before = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation({"text_config": "plain"} if hasattr(model.config, "text_config") else "plain")
    head = model.model.generation_head if hasattr(model.model, "generation_head") else model.lm_head
    with torch.no_grad():
        for feed in feeds:
            states = model.get_decoder()(**{**feed, CACHE: cache}).last_hidden_state
            scores.append(head(states[:, -1]))
    model.set_attn_implementation({"text_config": before} if hasattr(model.config, "text_config") else before)
    return scores[1:], attention


@pytest.mark.parametrize("family", ["janus", "grouped", "text"])
def test_every_number_is_that_of_plain_loops(monkeypatch, family):
    generator = make_generator(family)
    generator.model.double()
    labels, guidance, temperature = HeadMap(LABELS, GRID), 2.5, 0.8
    feeds = []

    def keep(module, args, kwargs):
        feeds.append({name: value for name, value in kwargs.items() if name != CACHE})

    hook = generator.model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    sampling = {"guidance_scale": guidance, "temperature": temperature, "seed": 5}
    tokens = generator.generate(PROMPTS, DynamicCache(), **sampling)
    hook.remove()
    assert len(feeds) == CELLS
    results = measure_fidelity(
        generator, PROMPTS, {name: lambda s=s: SSDCache(labels, **s) for name, s in SETTINGS.items()}, **sampling
    )
    full_scores, full = plain_run(
        generator, monkeypatch, feeds, lambda layer, head: ReferenceHead("spatial", CELLS, CELLS, 1, 0, 0)
    )
    without = generator.is_unconditional(len(PROMPTS))

    def log_probabilities(scores):
        if without.any():
            scores = scores[without] + guidance * (scores[~without] - scores[without])
        return (scores / temperature).log_softmax(-1)

    for name, settings in SETTINGS.items():
        result, budget = results[name], settings["budget"]

        def make_head(layer, head, settings=settings, budget=budget):
            kind = "spatial" if LABELS[layer, head] else "semantic"
            slots = budget[kind] if isinstance(budget, dict) else budget
            sinks = settings.get("num_sinks", 0)
            return ReferenceHead(kind, slots, CELLS, settings["buffer"], settings["num_recent"], sinks)

        scores, plain = plain_run(generator, monkeypatch, feeds, make_head)
        assert torch.equal(result.tokens, tokens)
        assert result.kl.shape == (len(PROMPTS), STEPS)
        for step in range(STEPS):
            log_p, log_q = log_probabilities(full_scores[step]), log_probabilities(scores[step])
            expected = (log_p.exp() * (log_p - log_q)).sum(-1)
            # float64 on both sides: sums of tens of terms, in another order
            torch.testing.assert_close(result.kl[:, step], expected, rtol=1e-8, atol=1e-12)
            assert torch.equal(result.agrees[:, step], log_p.argmax(-1) == log_q.argmax(-1))
            for layer in range(2):
                was, now = full.outputs[step][layer], plain.outputs[step][layer]
                error = ((now - was).norm(dim=-1) / was.norm(dim=-1)).mean().item()
                # outputs are rounded to float32 before they are subtracted: 6e-8 of their norm
                assert result.attention_error[step, layer].item() == pytest.approx(error, rel=1e-5, abs=1e-6)
                for head in range(2):
                    shares = []
                    for row in range(len(without)):
                        weights = full.heads[layer][row][head].received[step]
                        groups = 2 if family != "janus" else 1
                        lost = sum(weights[token] for token in set(weights) - set(plain.kept[step][layer, row, head]))
                        shares.append(1 - lost / groups)
                    # logits in float32: those below 16 are off by up to 1e-6, and so are the weights
                    mean = sum(shares) / len(shares)
                    assert result.retained[step, layer, head].item() == pytest.approx(mean, abs=5e-6)
        assert result.kl.max() > 0.01  # something was lost
        assert result.retained.min() < 0.95


# --- exact zeros, and the same tokens


@pytest.mark.parametrize("family", ["janus", "grouped", "text"])
def test_nothing_is_lost_where_nothing_is_evicted(family):
    generator, labels = make_generator(family), HeadMap(LABELS, GRID)
    caches = {
        policy: lambda policy=policy: SSDCache.from_policy(policy, labels, 1.0)
        for policy in ("full", "ssd", "h2o", "streaming-llm", "linear")
    }
    for result in measure_fidelity(generator, PROMPTS, caches, seed=2).values():
        assert (result.kl == 0).all()  # bit for bit, in float32
        assert result.agrees.all()
        assert (result.attention_error == 0).all()
        # a sum of up to 50 weights that are rounded to float32 each
        torch.testing.assert_close(result.retained, torch.ones(STEPS, 2, 2), rtol=0, atol=5e-6)
        assert result.budget == 1.0


def test_the_images_are_those_of_the_full_cache_and_given_tokens_are_fed():
    generator, labels = make_generator("janus"), HeadMap(LABELS, GRID)
    caches = {"h2o": lambda: SSDCache.from_policy("h2o", labels, 12, buffer=3)}
    generated = measure_fidelity(generator, PROMPTS, caches, seed=7)["h2o"]
    tokens = generator.generate(PROMPTS, DynamicCache(), temperature=1.0, seed=7)
    assert torch.equal(generated.tokens, tokens)
    again = measure_fidelity(generator, PROMPTS, caches, seed=8, tokens=tokens)["h2o"]
    for name in ("tokens", "kl", "agrees", "attention_error", "retained"):
        assert torch.equal(getattr(again, name), getattr(generated, name)), name
    others = torch.randint(0, 32, (2, CELLS), generator=torch.Generator().manual_seed(0))
    other = measure_fidelity(generator, PROMPTS, caches, tokens=others)["h2o"]
    assert torch.equal(other.tokens, others)
    assert not torch.equal(other.kl, generated.kl)


@pytest.mark.parametrize("rounding", [0, 1e-9], ids=["torch", "kernel"])
def test_caches_beside_do_not_matter_and_less_budget_holds_less(rounding, monkeypatch):
    """Until the slots are full nothing differs from the full cache; with torch's attention, exactly nothing."""
    if not rounding:
        monkeypatch.setattr(dispatch, "can_serve", lambda *states, **options: False)
    generator, labels = make_generator("janus"), HeadMap(LABELS, GRID)
    caches = {
        f"streaming-llm {budget}": lambda budget=budget: SSDCache.from_policy("streaming-llm", labels, budget, buffer=2)
        for budget in (10, 20, 30)
    }
    together = measure_fidelity(generator, PROMPTS, caches)
    alone = measure_fidelity(generator, PROMPTS, {"one": caches["streaming-llm 20"]})["one"]
    assert torch.equal(alone.kl, together["streaming-llm 20"].kl)
    assert torch.equal(alone.retained, together["streaming-llm 20"].retained)
    held = [result.mean_retained for result in together.values()]
    assert held == sorted(held)
    assert [result.budget for result in together.values()] == [10 / 36, 20 / 36, 30 / 36]
    for budget, result in zip((10, 20, 30), together.values(), strict=True):
        assert (result.kl[:, :budget] <= rounding).all()
        assert (result.kl[:, budget] > 1e-7).all()


# --- what stays on the model


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_nothing_stays_on_the_model_also_after_a_failure():
    generator, labels = make_generator("janus"), HeadMap(LABELS, GRID)
    generator.model.set_attn_implementation({"text_config": "sdpa"})
    caches = {"h2o": lambda: SSDCache.from_policy("h2o", labels, 12, buffer=3)}
    measure_fidelity(generator, PROMPTS, caches)
    assert hooks_of(generator.model) == 0
    weight = generator.model.get_decoder().layers[1].self_attn.k_proj.weight.data
    weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 1, KV head 0.* is NaN.*bfloat16 or float32|gives NaN or infinite"):
        measure_fidelity(generator, PROMPTS, caches)
    assert hooks_of(generator.model) == 0
    assert generator.model.config.text_config._attn_implementation == "sdpa"


# --- refusals


def h2o(**settings):
    return {"h2o": lambda: SSDCache.from_policy("h2o", HeadMap(LABELS, GRID), 12, buffer=3, **settings)}


REUSED = SSDCache(HeadMap(LABELS, GRID), 14, buffer=3)
BAD = [
    ({"caches": {}}, ValueError, "caches is empty: give at least one"),
    ({"caches": {"dynamic": DynamicCache}}, ValueError, r"caches\['dynamic'\] makes a DynamicCache"),
    ({"caches": {"a": lambda: REUSED, "b": lambda: REUSED}}, ValueError, "makes the same cache twice, or a used one"),
    ({"caches": {"a": lambda: SSDCache(HeadMap(LABELS), 115)}}, HeadMapError, "24 x 24"),
    ({"caches": {"a": lambda: SSDCache(HeadMap(LABELS[:1], GRID), 14, buffer=3)}}, HeadMapError, "1 layers"),
    ({"temperature": 0}, GeneratorError, "temperature=0 leaves one token"),
    ({"temperature": -1.0}, GeneratorError, "temperature=-1.0 is out of range"),
    ({"guidance_scale": 1.0}, GeneratorError, "guidance_scale=1.0 is out of range"),
    ({"seed": -1}, GeneratorError, "seed=-1 is out of range"),
    ({"prompts": []}, GeneratorError, "give at least one prompt"),
    ({"prompts": ["  "]}, GeneratorError, "none that is empty"),
    ({"prompts": "a photo"}, GeneratorError, "is one text"),
    ({"tokens": torch.zeros(2, 35, dtype=torch.long)}, GeneratorError, r"int64 \[2, 35\]: give integers \[2, 36\]"),
    ({"tokens": torch.zeros(1, 36, dtype=torch.long)}, GeneratorError, r"give integers \[2, 36\]"),
    ({"tokens": torch.zeros(2, 36)}, GeneratorError, "tokens are torch.float32"),
    ({"tokens": torch.full((2, 36), -1)}, GeneratorError, "tokens range from -1 to -1"),
    (
        {"tokens": torch.full((2, 36), 32)},
        GeneratorError,
        "tokens range from 32 to 32: the visual tokens are 0 to 31",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_what_can_not_be_measured_is_refused(changes, error, message):
    arguments = {"prompts": PROMPTS, "caches": h2o(), **changes}
    with pytest.raises(error, match=message):
        measure_fidelity(make_generator("janus"), **arguments)


def test_a_model_built_otherwise_is_refused():
    generator = make_generator("janus")
    attention = generator.model.get_decoder().layers[0].self_attn
    attention.out, attention.o_proj = attention.o_proj, None
    del attention.o_proj
    with pytest.raises(GeneratorError, match=r"cannot be compared: its decoder has 2 layers, and 1 attention outputs"):
        measure_fidelity(generator, PROMPTS, h2o())


# --- sums


def test_sums_are_means_of_what_was_measured():
    kl = torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]], dtype=torch.float64)
    result = Fidelity(
        layout=ImageLayout((2, 2)),
        tokens=torch.zeros(2, 4, dtype=torch.long),
        budget=0.5,
        is_spatial=torch.tensor([[True, False]]),
        kl=kl,
        agrees=kl < 3,
        attention_error=torch.tensor([[0.0], [0.1], [0.5]]),
        retained=torch.tensor([[[1.0, 0.8]], [[0.5, 0.6]], [[0.6, 0.1]]]),
    )
    assert result.mean_kl == 2.0
    assert result.kl_standard_error == pytest.approx(math.sqrt(2) / math.sqrt(2))  # images have 1 and 3
    assert result.agreement == pytest.approx(4 / 6)
    assert result.mean_attention_error == pytest.approx(0.2)
    assert result.mean_retained == pytest.approx(0.6)
    assert result.retained_by_kind("spatial") == pytest.approx(0.7)
    assert result.retained_by_kind("semantic") == pytest.approx(0.5)
    assert result.by_grid_row(kl.T).tolist() == [[0.5, 2.5], [2.0, 4.0]]
    drafted = replace(result, layout=ImageLayout((1, 2), ((1, 1), (1, 1))))
    assert drafted.by_grid_row(kl.T).tolist() == [[0.0, 2.0], [1.0, 3.0], [2.0, 4.0]]
    narrow = replace(result, layout=ImageLayout((2, 1), ((1, 1), (1, 1))))
    assert narrow.by_grid_row(kl.T).tolist() == kl.T.tolist()  # the last row has no step
    assert Fidelity(ImageLayout((2, 2)), result.tokens[:1], 0.5, torch.tensor([[True, True]]), kl[:1], kl[:1] < 3,
                    result.attention_error, result.retained).kl_standard_error is None  # fmt: skip


def test_a_figure_has_a_line_for_every_cache():
    labels = HeadMap(LABELS, GRID)
    caches = {
        f"{policy} {budget}": lambda policy=policy, budget=budget: SSDCache.from_policy(
            policy, labels, budget, buffer=2, **({"num_sinks": 0} if policy == "streaming-llm" else {})
        )
        for policy in ("ssd", "h2o")
        for budget in (12, 36)
    }
    results = measure_fidelity(make_generator("janus"), PROMPTS[:1], caches)
    axes = draw_fidelity(results).axes
    assert [len(panel.lines) for panel in axes[:3]] == [4, 4, 2]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes[0].lines}) == 4
    assert len(draw_fidelity({"ssd": results["ssd 12"]}).axes) == 4  # no curve over one budget; the bar counts


def test_a_figure_of_many_caches_has_curves_of_the_smallest_budgets_only():
    labels = HeadMap(LABELS, GRID)
    caches = {
        f"{policy} {budget}": partial(SSDCache.from_policy, policy, labels, budget, buffer=2)
        for policy in ("ssd", "h2o", "margin")
        for budget in (36, 24, 12)
    }
    figure = draw_fidelity(measure_fidelity(make_generator("janus"), PROMPTS[:1], caches))
    assert [len(panel.lines) for panel in figure.axes[:3]] == [3, 3, 3]
    assert [len(line.get_xdata()) for line in figure.axes[2].lines] == [3, 3, 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ssd 12", "h2o 12", "margin 12"]


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """`run(*arguments)` of `eval fidelity` with the small model, in an empty folder; gives typer's result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def invoke(*arguments):
        options = [] if "--model" in arguments else ["--model", folder]
        return CliRunner().invoke(app, ["eval", "fidelity", *map(str, [*arguments, *options])])

    return invoke


def test_the_temperature_is_the_models_own():
    generator = make_generator("janus")
    caches = {"ssd": lambda: SSDCache(HeadMap(LABELS, GRID), 8, buffer=4)}
    hot = measure_fidelity(generator, PROMPTS, caches)["ssd"]
    generator.model.generation_config.temperature = 0.5
    own = measure_fidelity(generator, PROMPTS, caches)["ssd"]
    given = measure_fidelity(generator, PROMPTS, caches, temperature=0.5)["ssd"]
    assert torch.equal(own.kl, given.kl)
    assert not torch.equal(own.kl, hot.kl)


def test_the_command_writes_what_the_library_measures(run, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run_ = run("--prompts-file", "prompts.txt", "--num-images", 3, "--policies", "ssd,full", "--budgets", "0.4,30",
               "--buffer", 4, "--guidance", 2, "--seed", 3, "--output", "out")  # fmt: skip
    assert run_.exit_code == 0, (run_.output, run_.exception)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fidelity.json", "fidelity.png"]
    for words in ("ssd", "40%", "30", "full", "100%", "retained", "wrote fidelity.json and fidelity.png in out"):
        assert words in run_.stdout
    written = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert list(written["results"]) == ["ssd 40%", "ssd 30", "full 100%"]
    conditions = written["conditions"]
    assert conditions["prompts"] == [*PROMPTS, PROMPTS[0]]
    assert (conditions["guidance_scale"], conditions["temperature"], conditions["seed"]) == (2.0, 1.0, 3)
    assert conditions["policies"]["ssd 40%"]["num_slots"] == round(0.4 * SIDE * SIDE)
    assert conditions["policies"]["ssd 40%"]["head_map"] == head_map().digest
    generator = find_generator(str(folder)).load()
    expected = measure_fidelity(
        generator,
        conditions["prompts"],
        {"ssd": lambda: SSDCache(head_map(), 0.4, buffer=4)},
        guidance_scale=2.0,
        seed=3,
    )["ssd"]
    found = written["results"]["ssd 40%"]
    assert written["tokens"] == expected.tokens.tolist()
    assert found["mean_kl"] == pytest.approx(expected.mean_kl, rel=1e-6)
    assert torch.tensor(found["kl"]).shape == (3, SIDE * SIDE - 1)
    assert torch.tensor(found["retained_by_grid_row"]).shape == (SIDE, LAYERS, HEADS)
    full = written["results"]["full 100%"]
    assert full["mean_kl"] == full["mean_attention_error"] == 0
    assert full["agreement"] == 1
    with Image.open(tmp_path / "out" / "fidelity.png") as image:
        assert image.width == 1000


# --- in parts


PARTED = {"ssd": dict(SETTINGS["ssd"]), "every step": dict(SETTINGS["every step"])}
TEXTS = [*PROMPTS, "a photo of two triangles", "a red circle", "a blue square"]


def parted(generator, **settings):
    caches = {
        name: lambda options=options: SSDCache(HeadMap(LABELS, GRID), **options) for name, options in PARTED.items()
    }
    return measure_fidelity(generator, TEXTS, caches, **{"guidance_scale": 2.0, "seed": 5, **settings})


@pytest.fixture(scope="module")
def whole():
    return parted(make_generator("janus"), batch_size=5)


def test_parts_are_measured_on_the_images_of_one_batch(whole):
    caches = {"ssd": lambda: SSDCache(HeadMap(LABELS, GRID), **SETTINGS["ssd"])}
    at_once = measure_fidelity(make_generator("janus"), TEXTS, caches, guidance_scale=2.0, seed=5)["ssd"]
    for name in ("tokens", "kl", "agrees", "attention_error", "retained"):
        assert torch.equal(getattr(whole["ssd"], name), getattr(at_once, name))
    for name, result in parted(make_generator("janus"), batch_size=2).items():
        assert torch.equal(result.tokens, whole[name].tokens)
        for field in ("kl", "attention_error", "retained"):  # float32 products of other batch sizes round otherwise
            torch.testing.assert_close(getattr(result, field), getattr(whole[name], field), rtol=1e-3, atol=1e-5)
        assert (result.budget, result.layout) == (whole[name].budget, whole[name].layout)
        assert torch.equal(result.is_spatial, whole[name].is_spatial)


def test_an_interrupted_measurement_goes_on_after_its_last_part(tmp_path, monkeypatch):
    generator, state = make_generator("janus"), tmp_path / "state"
    expected, calls, real = parted(generator, batch_size=2), [], measure.compare_caches

    def stops(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(measure, "compare_caches", stops)
    with pytest.raises(KeyboardInterrupt):
        parted(generator, batch_size=2, state_file=state)
    before = state.read_bytes()
    with pytest.raises(ProfilingError, match="another run .seed 5 there, 6 now"):
        parted(generator, batch_size=2, state_file=state, seed=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PARTED, "ssd", {**PARTED["ssd"], "num_sinks": 0})
        with pytest.raises(ProfilingError, match="another run .caches"):
            parted(generator, batch_size=2, state_file=state)
    assert state.read_bytes() == before
    found = parted(generator, batch_size=2, state_file=state)
    assert calls == [2, 2, 2, 1]
    parted(generator, batch_size=2, state_file=state)
    assert len(calls) == 4  # nothing is left
    for name in expected:
        for field in dataclasses.fields(Fidelity):
            one, other = (getattr(results[name], field.name) for results in (expected, found))
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


WRONG = [
    (["--batch-size", "0"], "Invalid value for '--batch-size'"),
    (["--policies", "sdd"], "unknown policy 'sdd'; did you mean 'ssd'?"),
    (["--policies", "ssd:bufer=3"], "unknown setting 'bufer' (did you mean 'buffer'?)"),
    (["--budgets", "0"], "give a fraction of the grid above 0"),
    (["--budgets", "0.2,65"], "--budgets 65: an image has 64 visual tokens; give at most 64"),
    (["--budgets", "0.1"], "raise the budget, or lower buffer"),
    (["--num-images", "0"], "Invalid value for '--num-images'"),
    (["--temperature", "0"], "temperature=0 leaves one token"),
    (["--guidance", "0.5"], "guidance_scale=0.5 is out of range"),
    (["--prompts-file", "missing.txt"], "cannot read --prompts-file missing.txt"),
    ([" "], "none that is empty"),
    (["--output", "file"], "--output file is a file; give a folder"),
    (["--head-map", "./nowhere"], "nowhere"),
    (["--head-map", "other"], "24 x 24"),
    (["--head-map", "online"], "--head-map online: online labels are a policy here"),
    (["--model", "./nowhere"], "no such folder"),
    (["--dtype", "int4"], "unknown dtype 'int4'"),
    (["--device", "cuda:99"], "cannot be used on this machine"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_use_is_one_line_before_weights_are_loaded(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "file").write_text("")
    HeadMap(torch.ones(LAYERS, HEADS, dtype=torch.bool)).save_pretrained(tmp_path / "other")
    before = sorted(tmp_path.iterdir())
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_without_matplotlib_the_remedy_is_told_first(run, monkeypatch):
    monkeypatch.setattr("ssd_cache.analysis.plotting.find_spec", lambda name: None)
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))
    result = run("--budgets", "0.5")
    assert result.exit_code == 2
    assert "pip install -e '.[plot]'" in result.stderr


def test_caches_are_gone_with_the_measurement():
    generator = make_generator("janus")
    gone = []

    def make_cache():
        cache = SSDCache(HeadMap.uniform("semantic", num_layers=2, num_kv_heads=2, grid=GRID), 0.5)
        gone.append(weakref.ref(cache))
        return cache

    gc.disable()  # or it may come by chance
    try:
        measure_fidelity(generator, PROMPTS, {"one": make_cache})
        assert gone[0]() is None
    finally:
        gc.enable()
