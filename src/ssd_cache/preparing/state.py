"""The state folder of a preparation: `plan.json`, one state file for each stage, and the maps of finished stages.

`plan.json` holds everything that the results depend on, the measured costs, and a record of each finished stage. A
stage is finished for a certain map of the stage before it: if that map changes, the stage runs again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssd_cache.head_map.checks import HeadMapError
from ssd_cache.head_map.files import CONFIG_NAME
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.io.untrusted import checked, parse_json
from ssd_cache.io.writing import write_files
from ssd_cache.runs.metering import Cost
from ssd_cache.runs.run_state import ProfilingError, check_same_run, check_state_place, not_a_state

FORMAT, WHAT = "ssd-cache prepare 1", "the plan of ssd-cache prepare"
PLAN = "plan.json"


class StateFolder:
    """The folder of a run; only the main process makes one that is written.

    Attributes:
        path: the folder.
        settings: everything that the results depend on, as JSON values; empty until `begin`.
        costs: measured costs by name: of first batches, and of whole stages.
        finished: by stage, the checksum of the map that it began with.
    """

    def __init__(self, path: Path):
        """Read the plan if there is one.

        Raises:
            ProfilingError: another file, a plan of another version, or a folder that cannot be written.
        """
        self.path = path
        self.settings: dict[str, Any] = {}
        self.costs: dict[str, Cost] = {}
        self.finished: dict[str, str] = {}
        plan = path / PLAN
        check_state_place(plan)
        if not plan.exists():
            return
        try:
            content = checked(dict[str, Any], parse_json(plan.read_bytes()))
            if content.get("format") != FORMAT:
                raise ValueError("it is of another kind or version")
            self.settings = checked(dict, content.get("settings"), "settings")
            self.costs = checked(dict[str, Cost], content.get("costs"), "costs")
            self.finished = checked(dict[str, str], content.get("finished"), "finished")
        except (OSError, ValueError) as error:
            raise not_a_state(plan, WHAT, error) from error

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the plan of a new run, or refuse to go on with a run of other settings.

        Raises:
            ProfilingError: the settings differ, each of them named; or the plan cannot be written.
        """
        wanted = json.loads(json.dumps(settings))
        if self.settings:
            check_same_run(self.path / PLAN, self.settings, wanted)
        self.settings = wanted
        self.save()

    def file(self, stage: str) -> Path:
        """The state file of a stage."""
        return self.path / f"{stage}.state"

    def result(self, stage: str, before: HeadMap | None) -> HeadMap | None:
        """The map of a stage that is finished for the map `before`, else None."""
        if self.finished.get(stage) != _checksum(before):
            return None
        try:
            return HeadMap.from_pretrained(self.path / stage)
        except HeadMapError:  # deleted, or half-written
            return None

    def finish(self, stage: str, before: HeadMap | None, result: HeadMap) -> HeadMap:
        """Keep the map of a stage, and return it as `result` will read it."""
        result.save_pretrained(self.path / stage)
        self.finished[stage] = _checksum(before)
        self.save()
        return HeadMap.from_pretrained(self.path / stage)

    def add_cost(self, name: str, cost: Cost) -> None:
        """Add a measured cost to that of earlier calls."""
        if (earlier := self.costs.get(name)) is not None:
            peaks = [peak for peak in (earlier.peak_bytes, cost.peak_bytes) if peak is not None]
            cost = Cost(earlier.seconds + cost.seconds, max(peaks, default=None))
        self.costs[name] = cost
        self.save()

    def save(self) -> None:
        """Write the plan, completely or not at all; raises ProfilingError."""
        costs = {name: asdict(cost) for name, cost in self.costs.items()}
        content = {"format": FORMAT, "settings": self.settings, "costs": costs, "finished": self.finished}
        write_part(self.path / PLAN, content)


def write_part(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of the state, completely or not at all; raises ProfilingError."""
    try:
        write_files({path: json.dumps(content, indent=1, allow_nan=False).encode()})
    except OSError as error:
        raise ProfilingError(
            f"{path}: it cannot be written ({error.strerror}); make room, and run the same command again to resume"
        ) from error


def _checksum(head_map: HeadMap | None) -> str:
    """A checksum of a saved map, with its scores and facts; "" for none."""
    if head_map is None:
        return ""
    return hashlib.sha256((Path(head_map.origin) / CONFIG_NAME).read_bytes()).hexdigest()
