"""The default batch size: the same number while memory suffices, fewer images where it does not."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_checkpoint import head_map, write_checkpoint, write_family

from ssd_cache import SSDCache
from ssd_cache.models import find_generator
from ssd_cache.runs import batching
from ssd_cache.runs.batching import USABLE, default_batch_size, free_memory, image_nbytes

PROMPTS = ["a photo of a red circle", "a photo of two squares"]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return find_generator(str(write_checkpoint(tmp_path_factory.mktemp("tiny") / "model"))).load()


@pytest.mark.filterwarnings("ignore:.*generated at once")
@pytest.mark.parametrize("most", [1, 4, 16, 32, 60])
def test_a_batch_fits_and_only_halves(generator, most, monkeypatch):
    of_image, sizes = image_nbytes(generator, len(PROMPTS[0]) // 3 + 64), []
    for number in (1000, 20, 5, 1, 0):  # images that the memory could hold
        monkeypatch.setattr(batching, "free_memory", lambda device, number=number: number * of_image)
        sizes.append(default_batch_size(generator, PROMPTS[:1], most))
        assert sizes[-1] == 1 or sizes[-1] <= USABLE * number
        assert sizes[-1] in [most // 2**times for times in range(7)]
        assert sizes[-1] == most or 2 * sizes[-1] + 1 > USABLE * number, "no smaller than it has to be"
    assert sizes[0] == most
    assert sizes[-1] == 1


@pytest.mark.parametrize("budget", [1.0, 0.5, {"spatial": 20, "semantic": 40}])
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_the_bytes_of_an_image_are_those_of_its_cache(generator, budget, kv_dtype):
    cache = SSDCache(head_map(), budget, kv_dtype=kv_dtype)
    generator.generate(PROMPTS[:1], cache)
    assert image_nbytes(generator, cache.layers[0].num_prompt, cache) == cache.nbytes


@pytest.mark.parametrize(("family", "grid"), [("janus", None), ("emu3", (8, 8)), ("glm", (16, 12)), ("llama", (8, 8))])
def test_rows_of_guidance_count_in_every_family(family, grid, tmp_path):
    generator = find_generator(str(write_family(family, tmp_path / family)), grid).load()
    checkpoint = generator.checkpoint
    shape = {"num_layers": checkpoint.num_layers, "num_kv_heads": checkpoint.num_kv_heads}
    full = SSDCache(head_map().online(**shape).with_layout(checkpoint.layout), 1.0)
    generator.generate(["a red circle"], full, guidance_scale=2.0 if generator.default_guidance else None)
    num_prompt = full.layers[0].num_prompt
    assert image_nbytes(generator, num_prompt) == image_nbytes(generator, num_prompt, full) >= full.nbytes
    assert image_nbytes(generator, num_prompt) < 1.1 * full.nbytes


def test_free_memory_is_what_the_system_says(monkeypatch, tmp_path):
    """Other processes change it at any time, so it is read between two readings of psutil that are equal."""
    psutil = pytest.importorskip("psutil", reason="psutil, which accelerate needs, reads the same number")
    monkeypatch.setattr(batching, "CGROUP", tmp_path)  # no limit
    for _ in range(1000):
        before, free, after = (
            psutil.virtual_memory().available,
            free_memory(torch.device("cpu")),
            psutil.virtual_memory().available,
        )
        if before == after:
            break
    assert before == free == after


@pytest.mark.parametrize(("limit", "left"), [("1000", 350), ("max", None), ("600", 0)])
def test_the_limit_of_a_container_leaves_less(limit, left, monkeypatch, tmp_path):
    monkeypatch.setattr(batching, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("file 90\ninactive_file 50\nactive_file 40\n")
    free = free_memory(torch.device("cpu"))
    assert free > 2**20 if left is None else free == left


def test_the_number_is_fixed_while_memory_suffices(generator, recwarn):
    assert default_batch_size(generator, PROMPTS * 5000) == 32
    assert default_batch_size(generator, PROMPTS, 4) == 4
    assert not [warning for warning in recwarn if "generated at once" in str(warning.message)]


def test_less_memory_gives_fewer_images_and_says_so(generator, monkeypatch):
    cache = SSDCache(head_map(), 0.5)
    of_image = image_nbytes(generator, len(PROMPTS[0]) // 3 + 64, cache)
    monkeypatch.setattr(batching, "free_memory", lambda device: int(10 * of_image / USABLE))
    with pytest.warns(UserWarning, match=r"8 image\(s\) are generated at once instead of 32: the free memory of cpu"):
        assert default_batch_size(generator, PROMPTS * 100, cache=cache) == 8
    with pytest.warns(UserWarning, match="instead of 32"):
        assert default_batch_size(generator, PROMPTS * 100) < 8  # a full cache
    with pytest.warns(UserWarning, match="instead of 32"):
        assert default_batch_size(generator, ["a photo " * 300] * 100, cache=cache) < 8  # a long prompt
    assert default_batch_size(generator, PROMPTS, cache=cache) == 8  # both fit, so there is nothing to say


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the free memory of a GPU is found out on one")
def test_free_memory_of_a_gpu_counts_what_torch_holds_unused():
    device = torch.device("cuda")
    before = free_memory(device)
    held = torch.ones(2**28, device=device)
    assert free_memory(device) < before - held.nbytes // 2
    del held
    assert free_memory(device) > before - 2**28
