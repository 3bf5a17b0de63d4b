"""The short examples, run whole on small random models: what they write and print is real, if not pretty.

examples/train_shapes_janus.py has its own tests, and examples/profile_study.py made tables of the documentation.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import typer
from helpers.children import TWO_PROCESSES
from helpers.models import tiny_causal
from helpers.tiny_checkpoint import SIDE, write_checkpoint, write_family
from PIL import Image

from ssd_cache import HeadMap, SSDCache
from ssd_cache.models import find_generator

EXAMPLES = Path(__file__).parents[1] / "examples"
SVG = "http://www.w3.org/2000/svg"
PROMPTS = ["a photo of a red circle", "a photo of three squares", "a photo of a circle left of a triangle"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("examples") / "model", guidance_scale=3.0)


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.mark.parametrize("head_map", ["head_map", "online"])
def test_generate_janus_pro(folder, tmp_path, capsys, head_map):
    example = load("generate_janus_pro")
    head_map = head_map if head_map == "online" else str(folder / head_map)
    for name in ("one", "two"):
        example.main(PROMPTS, model=str(folder), head_map=head_map, budget=0.5, device="cpu", output=tmp_path / name)
    printed = capsys.readouterr().out
    held, full = (float(part.split(" MB")[0]) for part in printed.split("of K and V; a full cache would hold ")[:2])
    assert 0 < held < 0.8 * full
    for number in range(3):
        first, second = (Image.open(tmp_path / name / f"{number:03}.png") for name in ("one", "two"))
        assert first.size == (16 * SIDE, 16 * SIDE)
        assert first.tobytes() == second.tobytes()


def test_cache_bytes(folder, tmp_path, capsys):
    example, drawing = load("cache_bytes"), tmp_path / "bytes.svg"
    example.main(drawing, prompt="a <red> circle", model=str(folder), budget=0.5)
    full, small = map(int, re.findall(r"(\d+) bytes", capsys.readouterr().out))
    assert small < 0.8 * full
    root = ElementTree.parse(drawing).getroot()
    texts = ["".join(part.itertext()) for part in root.iter(f"{{{SVG}}}text")]
    assert texts[0] == "a <red> circle"
    assert f"full cache, {full / 1e6:.1f} MB" in texts
    assert len(list(root.iter(f"{{{SVG}}}image"))) == len(list(root.iter(f"{{{SVG}}}polyline"))) == 2


def test_the_drawing_of_the_documentation_is_small_and_says_what_the_readme_says():
    drawing = EXAMPLES.parent / "docs" / "cache-bytes.svg"
    assert drawing.stat().st_size < 200_000
    title = ElementTree.parse(drawing).getroot().find(f"{{{SVG}}}title").text
    full, small = re.search(r"grows to (\S+) MB, .* takes (\S+) MB", title).groups()
    for page in ("README.md", "docs/index.md"):
        assert f"grows to {full} MB, one with a budget of 20% takes {small} MB" in (EXAMPLES.parent / page).read_text()


def test_publish_head_map(folder, prompts_file, tmp_path, capsys, monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    load("publish_head_map").main(
        prompts_file, model=str(folder), budget=0.5, device="cpu", output=tmp_path / "map", repo="me/new-map"
    )
    made = HeadMap.from_pretrained(tmp_path / "map")
    assert made.profile["num_prompts"] == 3
    files = hub.repos["me/new-map"].commits[hub.repos["me/new-map"].refs["main"]]
    assert {"README.md", "config.json", "head_map.safetensors"} <= files.keys()
    assert HeadMap.from_pretrained("me/new-map") == made
    assert "3 prompts" in capsys.readouterr().out


def test_images_per_gpu_counts_what_a_cache_really_holds(folder, capsys):
    example = load("images_per_gpu")
    checkpoint = find_generator(str(folder))
    generator = checkpoint.load(device="cpu")
    for budget in (1.0, 0.5):
        cache = SSDCache(checkpoint.head_map(), budget)
        generator.generate(PROMPTS[:1], cache)
        num_prompt = cache.layers[0].num_prompt
        counted = example.need(checkpoint, cache, torch.float32, rows=2, num_prompt=num_prompt)
        assert counted.image == cache.nbytes
        assert counted.weights == sum(weight.nbytes for weight in generator.model.parameters())
    example.main(model=str(folder), budget=0.5, memory=0.01)
    lines = capsys.readouterr().out.splitlines()
    full, half = (int(line.split("at most ")[1].split()[0]) for line in lines[1:3])
    assert 0 < full < half < 2 * full
    assert example.Need(weights=10, image=3).images(9) == 0


def test_where_policies_fail_frames_what_is_wrong(tmp_path, capsys):
    example = load("where_policies_fail")
    example.main("streaming-llm", per_kind=1, device="cpu", output=tmp_path / "failures.png")
    wrong = capsys.readouterr().out.count("streaming-llm 20%: ")
    assert 0 < wrong < 6
    sheet = Image.open(tmp_path / "failures.png").convert("RGB")
    side = 384  # of an image of shapes-janus
    framed = sheet.get_flattened_data().count(example.WRONG)
    edge = side // 32
    assert framed == wrong * (side**2 - (side - 2 * edge) ** 2)


@pytest.mark.parametrize("num_slots", [(3, 1), (1, 6), (1, 1), (9, 2), (40, 40)])
def test_an_oracle_hides_what_is_least_attended(num_slots):
    received = torch.rand(2, 2, 8, generator=torch.Generator().manual_seed(sum(num_slots)))
    hidden = load("oracle_study").hide_least_attended(received, torch.tensor(num_slots))
    for row in range(2):
        for head, slots in enumerate(num_slots):
            order = sorted(range(7), key=lambda token: -float(received[row, head, token]))
            looked_at = {7, *order[: slots - 1]}
            found = set(range(8)) if hidden is None else {token for token in range(8) if not hidden[row, head, token]}
            assert found == looked_at


@pytest.mark.parametrize("buffer", [1, 3])
def test_hindsight_drops_what_has_least_to_come(buffer):
    example, num_tokens, slots = load("oracle_study"), 12, (5, 8)
    shape = (2, 2, num_tokens, num_tokens)  # [rows, heads, steps, tokens]
    attention = torch.rand(shape, generator=torch.Generator().manual_seed(buffer)).tril()
    recorder = example.Recorder(1)
    for step in range(num_tokens):
        assert recorder(0, attention[:, :, step, : step + 1]) is None
    hindsight = example.InHindsight(recorder, torch.tensor([slots]), buffer)
    held = {(row, head): [] for row in range(2) for head in range(2)}
    for step in range(num_tokens):
        hidden = hindsight(0, attention[:, :, step, : step + 1])
        for (row, head), tokens in held.items():
            if len(tokens) == slots[head]:
                to_come = {token: float(attention[row, head, step:, token].half().sum()) for token in tokens}
                tokens[:] = sorted(tokens, key=to_come.get)[buffer:]
            tokens.append(step)
            assert {token for token in range(step + 1) if not hidden[row, head, token]} == set(tokens)


def test_an_oracle_that_sees_everything_generates_as_the_full_cache(folder):
    example, generator = load("oracle_study"), find_generator(str(folder)).load(torch.float32, "cpu")
    head_map = generator.checkpoint.head_map()
    expected = generator.generate(PROMPTS, seed=7)

    def generate(hide):
        return example.generate_hidden(generator, head_map, hide, PROMPTS, 7)

    recorder = example.Recorder(head_map.num_layers)
    everything, few = (torch.full_like(head_map.is_spatial, size, dtype=torch.long) for size in (SIDE * SIDE, 4))
    assert torch.equal(generate(recorder), expected)
    received = [list(steps) for steps in recorder.received]
    assert torch.equal(generate(example.InHindsight(recorder, everything, 2)), expected)
    assert torch.equal(generate(example.AtEachStep(everything)), expected)
    recorder.received = received
    assert not torch.equal(generate(example.InHindsight(recorder, few, 2)), expected)
    assert not torch.equal(generate(example.AtEachStep(few)), expected)


@pytest.mark.parametrize("name", ["DynamicCache", "ssd 50%"])
def test_first_images_are_timed(folder, capsys, name):
    example = load("first_images")
    example.main(name, model=str(folder), batch_size=2)
    example.main(name, model=str(folder), batch_size=2, steps=True)
    images, steps = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{name}: 2 images of 4 rows in \d+\.\d s, \d+ tokens/s", images)
    assert re.fullmatch(rf"{name}: {SIDE * SIDE - 1} steps of 4 rows in \d+\.\d s, \d+ tokens/s", steps)


@pytest.mark.parametrize("room", [0, 1, 2, 5, 16, 37])
def test_images_per_gpu_finds_the_largest_batch(room):
    tried = []

    def generate(number):
        tried.append(number)
        if number > room:
            raise torch.OutOfMemoryError

    assert load("images_per_gpu").largest(generate) == room
    assert len(tried) <= 2 * (room + 2).bit_length()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the number of images that fit in a GPU is measured on one")
def test_images_per_gpu_generates_until_memory_is_full(folder, capsys):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(200e6 / total)
    try:
        load("images_per_gpu").main(model=str(folder), budget=0.5, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    full, half = (int(line.split()[1]) for line in capsys.readouterr().out.splitlines()[-2:])
    assert 0 < full <= half


def test_several_gpus_give_the_images_of_one_process_and_resume(folder, prompts_file, tmp_path):
    pytest.importorskip("accelerate")
    # one thread each, since sums in another order round differently
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*launcher):
        command = [sys.executable, *launcher, EXAMPLES / "several_gpus.py", prompts_file, "--model", folder]
        command += ["--budget", "0.5", "--batch-size", "1", "--device", "cpu", "--output", tmp_path / "both"]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return sorted(line for line in done.stdout.splitlines() if line.startswith("process"))

    example = load("several_gpus")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        example.main(prompts_file, model=str(folder), budget=0.5, batch_size=1, device="cpu", output=tmp_path / "alone")
    finally:
        torch.set_num_threads(threads)
    assert run(*TWO_PROCESSES) == ["process 0 of 2 on cpu: 2 images", "process 1 of 2 on cpu: 1 images"]
    alone, both = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("alone", "both"))
    assert alone == both
    assert {"00000.png", "00001.png", "00002.png"} < alone.keys()
    # as if a process had died: an image is missing, and another was being written
    (tmp_path / "both" / "00001.png").rename(tmp_path / "both" / ".00001.png.0.part")
    example.main(prompts_file, model=str(folder), budget=0.5, batch_size=1, device="cpu", output=tmp_path / "both")
    assert {path.name: path.read_bytes() for path in (tmp_path / "both").iterdir()} == alone


def test_caches_side_by_side_predict_a_text_as_each_alone():
    example, model = load("text_perplexity"), tiny_causal("llama")
    head_map = HeadMap(torch.tensor([[True, False], [False, True]]), (8, 8))
    tokens = torch.randint(0, 64, (example.NUM_PROMPT + 64,))

    def caches():
        kinds = [("full", {}), ("ssd", {}), ("online", {}), ("streaming-llm", {}), ("ssd", {"kv_dtype": "int8"})]
        return [SSDCache.from_policy(name, head_map, 0.4, **settings) for name, settings in kinds]

    together = example.perplexities(model, tokens, caches())
    alone = [example.perplexities(model, tokens, [cache])[0] for cache in caches()]
    logits = model(tokens[None]).logits[0].double().log_softmax(-1)[example.NUM_PROMPT : -1]
    whole = (-logits.gather(1, tokens[example.NUM_PROMPT + 1 :, None]).mean()).exp().item()
    assert together == pytest.approx(alone, rel=1e-5)  # float32: a batch sums in another order than a row
    assert together[0] == pytest.approx(whole, rel=1e-5)
    assert len({round(value, 3) for value in together}) == 5


def test_text_perplexity_makes_a_head_map_once_and_a_table(tmp_path, capsys):
    example, folder, text = load("text_perplexity"), write_family("llama", tmp_path / "model"), tmp_path / "text.txt"
    line = "a red circle and a blue square " * 4
    text.write_text("\n".join([line] * 6))
    call = {"text": text, "model": str(folder), "rows": 8, "columns": 4, "budgets": "0.5", "head_map": tmp_path / "map"}
    for policies in ("full,ssd,learned", "full,h2o"):
        example.main(policies=policies, num_steps=1, **call)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    (head, _, full, ssd, learned), (_, _, full_again, h2o) = cells[:5], cells[5:]
    assert [head, full[:2], ssd[::2], learned[::2], h2o[::2]] == [
        ["policy", "50%", "100%"],
        ["full", ""],
        ["ssd", ""],
        ["learned", ""],
        ["h2o", ""],
    ]
    assert full == full_again
    assert all(0 < float(value) < math.inf for value in (full[2], ssd[1], learned[1], h2o[1]))
    assert HeadMap.from_pretrained(tmp_path / "map").learned is not None
    with pytest.raises(typer.BadParameter, match="has .* tokens, and the grid takes 1632"):
        example.main(policies="full", **call | {"rows": 40, "columns": 40})
