"""The folder of a long run of several stages: `plan.json` with its settings, measured costs and finished stages.

Results of the stages lie beside it, in files that each run defines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssd_cache.io.untrusted import checked, parse_json, read_bytes
from ssd_cache.io.writing import remove_parts, write_files
from ssd_cache.runs.metering import Cost, highest_peak
from ssd_cache.runs.run_state import ProfilingError, check_same_run, check_state_place, not_a_state

PLAN = "plan.json"


class RunFolder:
    """The folder of a run; only the main process makes one that is written.

    Attributes:
        path: the folder.
        kind: name and version of the format, such as "ssd-cache prepare 1".
        settings: everything that the results depend on, as JSON values; empty until `begin`.
        costs: measured costs by name: of first batches, and of whole stages.
        finished: by stage, a text that identifies what it began with.
    """

    def __init__(self, path: Path, kind: str, what: str):
        """Read the plan if there is one; `what` describes it in messages.

        Raises:
            ProfilingError: another file, a plan of another version, or a folder that cannot be written.
        """
        self.path, self.kind = path, kind
        self.settings: dict[str, Any] = {}
        self.costs: dict[str, Cost] = {}
        self.finished: dict[str, str] = {}
        plan = path / PLAN
        check_state_place(plan)
        if not plan.exists():
            return
        try:
            content = checked(dict[str, Any], parse_json(read_bytes(plan)))
            if content.get("format") != kind:
                raise ValueError("it is of another kind or version")
            self.settings = checked(dict, content.get("settings"), "settings")
            self.costs = checked(dict[str, Cost], content.get("costs"), "costs")
            self.finished = checked(dict[str, str], content.get("finished"), "finished")
        except (OSError, ValueError) as error:
            raise not_a_state(plan, what, error) from error

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with a run in which some settings have other values; raises ProfilingError, as `begin`."""
        if self.settings:
            check_same_run(self.path / PLAN, {name: self.settings.get(name) for name in settings}, _as_json(settings))

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the plan of a new run, or refuse to go on with a run of other settings; removes half-written files.

        Raises:
            ProfilingError: the settings differ, each of them named; or the plan cannot be written.
        """
        wanted = _as_json(settings)
        if self.settings:
            check_same_run(self.path / PLAN, self.settings, wanted)
        self.settings = wanted
        try:
            remove_parts(self.path)
        except OSError as error:
            raise ProfilingError(f"{self.path}: a half-written file cannot be removed ({error.strerror})") from error
        self.save()

    def add_cost(self, name: str, cost: Cost) -> None:
        """Add a measured cost to that of earlier calls."""
        if (earlier := self.costs.get(name)) is not None:
            cost = Cost(earlier.seconds + cost.seconds, highest_peak(earlier, cost))
        self.costs[name] = cost
        self.save()

    def save(self) -> None:
        """Write the plan, completely or not at all; raises ProfilingError."""
        costs = {name: asdict(cost) for name, cost in self.costs.items()}
        content = {"format": self.kind, "settings": self.settings, "costs": costs, "finished": self.finished}
        write_part(self.path / PLAN, content)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a file gives them back: lists for tuples."""
    return json.loads(json.dumps(settings))


def write_part(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of a run, completely or not at all; raises ProfilingError."""
    try:
        write_files({path: json.dumps(content, indent=1, allow_nan=False).encode()})
    except OSError as error:
        raise ProfilingError(
            f"{path}: it cannot be written ({error.strerror}); make room, and run the same command again to resume"
        ) from error
