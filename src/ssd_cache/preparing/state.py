"""The state folder of a preparation: `plan.json`, one state file for each stage, and the maps of finished stages.

A stage is finished for a certain map of the stage before it: if that map changes, the stage runs again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ssd_cache.head_map.checks import HeadMapError
from ssd_cache.head_map.files import CONFIG_NAME
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.runs.run_folder import RunFolder

FORMAT, WHAT = "ssd-cache prepare 1", "the plan of ssd-cache prepare"


class StateFolder(RunFolder):
    """The folder of a preparation; `finished` has the checksum of the map that each stage began with."""

    def __init__(self, path: Path):
        super().__init__(path, FORMAT, WHAT)

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


def _checksum(head_map: HeadMap | None) -> str:
    """A checksum of a saved map, with its scores and facts; "" for none."""
    if head_map is None:
        return ""
    return hashlib.sha256((Path(head_map.origin) / CONFIG_NAME).read_bytes()).hexdigest()
