"""A whole run: the model, the machine's roofline, and every case at every batch size.

`bench/cases.py` and `bench/running.py` have checked the settings before. A `Report` is yielded after every batch size,
so that an interrupted run leaves results.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import ssd_cache
from ssd_cache.bench.cases import Case
from ssd_cache.bench.results import Report, Row, summarize
from ssd_cache.bench.roofline import measure_machine, step_work
from ssd_cache.bench.running import measure, timed_positions
from ssd_cache.bench.subject import GUIDANCE_SCALE, Subject


def run(
    subject: Subject,
    cases: Sequence[Case],
    *,
    batch_sizes: Sequence[int],
    windows: Sequence[range],
    rounds: int,
    command: str = "",
    progress: bool = False,
) -> Iterator[Report]:
    """Measure. Yields a report of all results after every batch size.

    Args:
        subject: the model.
        cases: caches and policies.
        batch_sizes: numbers of images at once; each has its own tables.
        windows: the visual tokens of an image that are generated, as from `choose_windows`.
        rounds: counted rounds.
        command: the command that repeats the run.
        progress: show a progress bar.
    """
    model, head_map = subject.model, subject.head_map
    machine = measure_machine(model.dtype, model.device)
    facts = _conditions(subject) | {
        "generated": f"{sum(map(len, windows))} tokens of each image",
        "rounds": f"{rounds}, interleaved, after one to warm up",
    }
    rows: list[Row] = []
    for batch_size in batch_sizes:
        for result in measure(subject, cases, windows, batch_size=batch_size, rounds=rounds, progress=progress):
            case = result.case
            if result.failure is not None:
                rows.append(Row(case.name, batch_size, failure=result.failure))
                continue
            rows.append(
                summarize(
                    result,
                    windows,
                    head_map.num_visual_tokens,
                    machine=machine,
                    work=step_work(subject, case, batch_size, timed_positions(windows)),
                )
            )
        yield Report(command, facts, machine, list(rows))


def weight_bytes(subject: Subject) -> int:
    """Bytes of all weights of the model, towers included; tied weights count once."""
    return sum(weight.nbytes for weight in subject.model.parameters())


def _conditions(subject: Subject) -> dict[str, Any]:
    """The model, the machine and the versions, as JSON values."""
    config, device, head_map = subject.config, subject.model.device, subject.head_map
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads of {subject.head_dim}"
    layout, is_guided = head_map.layout, subject.rows_per_image == 2
    return {
        "model": subject.name,
        "class": type(subject.model).__name__,
        "decoder": f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {heads}",
        "weights": weight_bytes(subject),
        "grid": f"{layout.text()} = {layout.num_tokens} visual tokens",
        "prompt": f"{subject.num_prompt} tokens",
        "guidance": f"{GUIDANCE_SCALE:g}, two rows an image" if is_guided else "none, one row an image",
        "head map": head_map.method or "the model's own",
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "ssd_cache": ssd_cache.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor as the system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
