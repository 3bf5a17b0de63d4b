"""A model on several devices: layers here and there, and heads shared by two processes as transformers splits them.

There is no second device on a test machine, so layers on two of them run with fake tensors, which have a device (lazy:0
will do) and no content: torch refuses to mix devices there as on real ones. Two real processes talk through gloo.
"""

from __future__ import annotations

import json
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.children import run_two
from helpers.models import left_padded_prompts, random_score, tiny_janus, tiny_llama
from helpers.tensor_parallel_child import CASES, SIDE, generate, generate_glm, generate_janus, load, main
from helpers.tiny_checkpoint import write_checkpoint, write_family
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GlmImageForConditionalGeneration, JanusForConditionalGeneration, LlamaForCausalLM

from ssd_cache import HeadMap, HeadMapError, SSDCache, enable
from ssd_cache.cache.scorers import SCORES
from ssd_cache.cache.sharding import is_distributed, own_heads, shard_of

MAP = HeadMap(torch.tensor([[True, False], [False, True]]), (SIDE, SIDE))
ONLINE = HeadMap.online(num_layers=2, num_kv_heads=2, grid=(SIDE, SIDE))


def learned_map(**settings):
    """The map with a learned score for the heads of `tiny_llama`."""
    return replace(MAP, learned=random_score(2, 2, 8, (SIDE, SIDE), **settings))


# Layers on different devices


def place(model, devices):
    """Put each layer on its device, the rest on the last, and move what comes in; as accelerate's hooks do."""

    def move(value, device):
        if isinstance(value, tuple):
            return tuple(move(part, device) for part in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def follow(device):
        def hook(module, args, kwargs):
            return move(args, device), {name: move(value, device) for name, value in kwargs.items()}

        return hook

    parts = [*zip(model.model.layers, devices, strict=True), (model.model.norm, devices[-1])]
    for module, device in [*parts, (model.lm_head, devices[-1])]:
        for part in module.modules():  # Module.to refuses fake weights
            for name, weight in part.named_parameters(recurse=False):
                setattr(part, name, torch.nn.Parameter(weight.to(device)))
        module.register_forward_pre_hook(follow(device), with_kwargs=True)


@pytest.mark.parametrize("budget", [1.0, 14, {"spatial": 14, "semantic": 16}], ids=str)
@pytest.mark.parametrize("devices", [("lazy:0", "lazy:1"), ("cpu", "lazy:0")], ids=" ".join)
def test_state_lives_with_its_layer(devices, budget):
    with FakeTensorMode(), torch.no_grad():
        model = tiny_llama()
        place(model, devices)
        cache = SSDCache(MAP, budget, buffer=4)
        ids = torch.ones(2, 7, dtype=torch.long)
        mask = torch.ones_like(ids)
        for step in range(30):
            logits = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            assert str(logits.device) == devices[-1]
            assert cache.get_seq_length() == 7 + step
            ids = torch.ones(2, 1, dtype=torch.long)
            mask = torch.ones(2, 8 + step, dtype=torch.long)
        for layer, device in zip(cache.layers, devices, strict=True):
            held = [tensor for store in layer.stores for tensor in vars(store).values()]
            held += [*vars(layer).values()]
            places = {str(tensor.device) for tensor in held if isinstance(tensor, torch.Tensor)}
            assert places == {device}


@pytest.mark.parametrize(
    ("head_map", "settings"),
    [
        (ONLINE, {"num_recent": 4}),
        (MAP, {"score": "mean"}),
        (MAP, {"score": "last"}),
        (MAP, {"score": "margin"}),
        (learned_map(), {"score": "learned"}),
        (learned_map(ranks_all=True), {"score": "learned"}),
        (MAP, {"kv_dtype": "int8"}),
        (MAP, {"kv_dtype": "fp8"}),
        (learned_map(), {"score": "learned", "kv_dtype": "fp8"}),
    ],
    ids=["online", "mean", "last", "margin", "learned", "ranks_all", "int8", "fp8", "learned fp8"],
)
def test_a_cache_assumes_neither_a_cpu_nor_cuda(head_map, settings):
    """All of a step, evictions included, stays on the model's device, as it must on MPS; nothing is computed."""
    cache = SSDCache(head_map, 14, buffer=4, **settings)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # the map's learned score is real, on the CPU
        model = tiny_llama()
        place(model, ("lazy:0", "lazy:0"))
        model(torch.ones(2, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
        for _ in range(20):
            logits = model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache, use_cache=True).logits
    held = [value for layer in cache.layers for store in layer.stores for value in vars(store).values()]
    assert {str(value.device) for value in [logits, *held] if isinstance(value, torch.Tensor)} == {"lazy:0"}
    assert cache.get_seq_length() == 27


def test_layers_that_accelerate_loads_from_disk_generate_the_same(tmp_path):
    pytest.importorskip("accelerate")
    tiny_llama(attn_implementation="sdpa").save_pretrained(tmp_path / "llama")
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    parts |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    split = LlamaForCausalLM.from_pretrained(
        tmp_path / "llama", device_map=parts, offload_folder=tmp_path / "off", attn_implementation="ssd"
    ).eval()
    assert split.model.layers[1].self_attn.k_proj.weight.device.type == "meta"  # it really is not here
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="ssd").eval()
    for budget in (1.0, 14):
        tokens = []
        for model in (split, whole):
            torch.manual_seed(0)
            cache = SSDCache(MAP, budget, buffer=4)
            tokens.append(model.generate(**left_padded_prompts([5, 9]), max_new_tokens=30, past_key_values=cache))
        torch.testing.assert_close(*tokens, rtol=0, atol=0)
    call, tokens = {**left_padded_prompts([5, 9]), "max_new_tokens": 30, "do_sample": False}, []
    for model in (split, whole):
        block = enable(model, MAP, budget=14, buffer=4, fast=model is split)
        with block, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokens.append(model.generate(**call))
        if model is split:  # accelerate's hooks are no code for a compiler
            (told,) = [text for warning in caught if (text := str(warning.message)).startswith("fast_decode")]
            assert told.startswith("fast_decode continues uncompiled")
            assert block.served_by().eager == 29
    assert torch.equal(*tokens)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes Python wait for a GPU: mixed devices, copies between them, and reading numbers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if tensors:  # what is made from numbers alone needs no copy
            assert len({tensor.device for tensor in [*tensors, *made]}) <= 1, function
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return result


class NoLists(TorchFunctionMode):
    """Refuses indexing by a list, which torch copies to the device where no dispatch mode sees it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in index), index
        return function(*args, **(kwargs or {}))


def test_a_learned_score_stays_on_the_device_of_its_layer():
    score = random_score(1, 2, 8, (SIDE, SIDE)).at(0).to(torch.device("meta"))
    with NoWaiting():
        assert score.of_places(torch.zeros(3, 2, 5, dtype=torch.int32, device="meta"), 40).shape == (3, 2, 5)


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_no_step_of_a_later_image_waits_for_the_device(score, has_kernel):
    """From the prompt to the last token, with evictions, eager and static; the attention itself is left out."""
    head_map = replace(MAP, learned=random_score(2, 2, 8, (SIDE, SIDE)))
    cache = SSDCache(head_map, {"spatial": 14, "semantic": 16}, buffer=4, score=score)
    prompt, mask = torch.empty(3, 2, 5, 8, device="meta"), torch.empty(3, 5, dtype=torch.bool, device="meta")

    def add(states, query=None):
        for index, layer in enumerate(cache.layers):
            cache.update(states, states, index)
            if query is None:
                layer.see_prompt(states, mask, 1.0, None)
                layer.has_kernel = has_kernel
            else:
                for store, slot, part in zip(layer.stores, layer.slots, layer.groups.split(query), strict=True):
                    store.hold(slot, part)
                layer._query_missing = False

    for image in range(2):
        cache.reset()
        with ExitStack() as stack:
            if image:
                stack.enter_context(NoWaiting())
                stack.enter_context(NoLists())
            add(prompt)
            for step in range(SIDE * SIDE - 1):
                token = torch.empty(3, 2, 1, 8, device="meta")
                with cache.static_step() if step > 10 else nullcontext():
                    add(token, token.view(3, 2, 1, 8))
    assert {store.num_seen for layer in cache.layers for store in layer.stores} == {SIDE * SIDE - 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device beside the CPU")
def test_layers_on_cpu_and_gpu_generate_what_a_dynamic_cache_generates():
    """The fake devices above compute nothing; this does."""
    model = tiny_llama()
    place(model, ("cpu", "cuda:0"))
    inputs = left_padded_prompts([5, 9])
    caches = DynamicCache(config=model.config), SSDCache(MAP, 1.0)
    tokens = [model.generate(**inputs, max_new_tokens=30, past_key_values=cache) for cache in caches]
    torch.testing.assert_close(*tokens, rtol=0, atol=0)


# Heads shared by processes


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of a Llama of 4 KV heads, a Janus and a GLM-Image of 2, and what two processes generated."""
    folder = tmp_path_factory.mktemp("parallel")
    tiny_llama(heads=8, kv_heads=4, attn_implementation="sdpa").save_pretrained(folder / "llama")
    tiny_janus(grid_side=SIDE, attn_implementation="sdpa").save_pretrained(folder / "janus")
    write_family("glm", folder / "glm")
    answers = run_two([folder], program=main)
    assert [code for code, _, _ in answers] == [0, 0], "\n".join(stderr for *_, stderr in answers)
    return folder, [json.loads(stdout.splitlines()[-1]) for _, stdout, _ in answers]


def test_two_processes_generate_the_same_as_one(both):
    folder, results = both
    model = load(LlamaForCausalLM, folder / "llama")
    for name, case in CASES.items():
        tokens, nbytes = generate(model, *case)
        parts = [result["cases"][name] for result in results]
        assert [part[0] for part in parts] == [tokens, tokens], name
        assert sum(part[1] for part in parts) == nbytes, name  # each holds its own heads and no others
    assert len({str(result["cases"][name][0]) for result in results for name in CASES}) > 3  # the cases differ


def test_two_processes_generate_a_janus_image(both):
    folder, results = both
    tokens = generate_janus(load(JanusForConditionalGeneration, folder / "janus"))
    assert [result["janus"] for result in results] == [tokens, tokens]


def test_two_processes_generate_a_glm_image_image(both):
    folder, results = both
    tokens = generate_glm(load(GlmImageForConditionalGeneration, folder / "glm"))
    assert [result["glm"] for result in results] == [tokens, tokens]


def test_processes_that_do_not_agree_are_told_both_in_each(both):
    _, results = both
    for rank, result in enumerate(results):
        for name in ("unlike maps", "unlike budgets"):
            message = result["errors"][name]
            assert "do not agree: process 0 has head map" in message
            assert "process 1 has head map" in message
        assert "'budget': 14, 'buffer': 4}, process 1" in result["errors"]["unlike budgets"]
        assert "has 2 layers x 4 KV heads" in result["errors"]["not told"], rank
        assert "a tensor parallel model needs enable or shard=" in result["errors"]["not told"]
        assert result["online heads"] == 2


def test_heads_are_not_measured_on_a_tensor_parallel_model(both):
    for rank, result in enumerate(both[1]):
        message = result["errors"]["profile"]
        assert f"LlamaForCausalLM is tensor parallel, and process {rank} of 2 has only its own heads" in message
        assert "without tp_plan" in message


def test_processes_that_share_prompts_and_do_not_agree_are_told_both_in_each(tmp_path):
    pytest.importorskip("accelerate")
    model = write_checkpoint(tmp_path / "janus")
    labels = HeadMap(torch.tensor([[True, False], [False, True]]), (8, 8), model_id=str(model))
    for rank, head_map in enumerate((labels, ~labels)):
        head_map.save_pretrained(tmp_path / f"map-{rank}")
    command = ["generate", "a red circle", "a blue square", "--batch-size", "1", "--output-dir", "out"]
    command += ["--model", model, "--budget", "14", "--buffer", "4", "--head-map"]
    answers = run_two([*command, "map-0"], [*command, "map-1"], cwd=tmp_path)
    for code, _, stderr in answers:
        assert code == 2, stderr
        message = stderr.splitlines()[-1]
        assert message.startswith("ssd-cache: processes 0 and 1 of 2 do not agree: ")
        assert labels.digest in message
        assert (~labels).digest in message
    assert not (tmp_path / "out").exists()


def test_a_part_of_a_map_is_refused_where_there_is_none():
    three = HeadMap.uniform("spatial", num_layers=1, num_kv_heads=3, grid=(SIDE, SIDE))
    with pytest.raises(HeadMapError, match="2 processes cannot share the 3 KV heads .*evenly.*divides 3"):
        SSDCache(three, 1.0, shard=(0, 2))
    with pytest.raises(ValueError, match=r"shard=\(2, 2\): give \(number of this process"):
        SSDCache(MAP, 1.0, shard=(2, 2))
    assert shard_of(tiny_llama()) == (0, 1)
    assert own_heads(MAP, (1, 2)) == slice(1, 2)
    cache = SSDCache(MAP, 1.0, shard=(1, 2))
    states = torch.zeros(1, 2, 3, 8)
    with pytest.raises(
        HeadMapError, match=r"x 2 KV heads, shard=\(1, 2\), but layer 0 of the model has 2 KV heads: use"
    ):
        cache.update(states, states, 0)


def test_a_torch_without_processes_is_not_asked_about_them(monkeypatch):
    """Builds without the distributed part have no `is_initialized`."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    assert not is_distributed()
