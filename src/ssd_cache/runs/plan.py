"""The plan of a long run of several stages: the images, estimated time and peak memory of each, as text.

It only formats. The runs make the estimates, from measured first batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssd_cache.runs.metering import Cost


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a stage; `disk_bytes` are those of its missing files, `note` is shown beside it."""

    stage: str
    num_images: int
    cost: Cost
    is_finished: bool
    disk_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The stages of a run with their estimated costs.

    Attributes:
        model, device: names.
        estimates: in the order of the stages.
    """

    model: str
    device: str
    estimates: Sequence[Estimate]

    @property
    def seconds(self) -> float:
        """Estimated seconds of the stages that are not finished."""
        return sum(estimate.cost.seconds for estimate in self.estimates if not estimate.is_finished)

    def text(self) -> str:
        """The plan as lines of text."""
        left = f"about {duration(self.seconds)}" if self.seconds else "nothing left to do"
        lines = [f"{self.model} on {self.device}: {left}"]
        width = max(10, *(len(estimate.stage) + 2 for estimate in self.estimates))
        has_disk = any(estimate.disk_bytes for estimate in self.estimates)
        head = f"{'stage':<{width}}{'images':>7}{'time':>12}{'peak memory':>14}"
        lines.append(head + (f"{'disk':>10}" if has_disk else ""))
        for estimate in self.estimates:
            seconds = "finished" if estimate.is_finished else duration(estimate.cost.seconds)
            columns = f"{seconds:>12}{memory(estimate.cost.peak_bytes):>14}"
            if has_disk:
                columns += f"{memory(estimate.disk_bytes) if estimate.disk_bytes else '':>10}"
            columns += f"  {estimate.note}"
            lines.append(f"{estimate.stage:<{width}}{estimate.num_images or '-':>7}{columns}".rstrip())
        return "\n".join(lines)


def duration(seconds: float) -> str:
    """A time in words, such as "42 s", "7 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def memory(num_bytes: int | None) -> str:
    """A number of bytes in words."""
    return "unknown" if num_bytes is None else f"{num_bytes / 1e9:.1f} GB"
