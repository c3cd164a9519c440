"""Results on disk: one JSON file per run, rewritten after every cell, so that an interrupted run loses nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from moduleformer_ext.files import write_file

from .harness import CellResult
from .machine import Limits

FILE = "results.json"


@dataclass
class Results:
    """Everything a report is made from."""

    machine: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    limits: dict[int, Limits] = field(default_factory=dict)
    """By number of threads."""
    cells: dict[str, CellResult] = field(default_factory=dict)
    """By key, in the order of measuring."""
    broken: dict[str, str] = field(default_factory=dict)
    """Sections that ended before their last cell, and how."""

    def section(self, name: str) -> list[CellResult]:
        return [cell for cell in self.cells.values() if cell.section == name]

    def save(self, directory: Path) -> None:
        data = {
            "machine": self.machine,
            "settings": self.settings,
            "limits": {str(threads): vars(limits) for threads, limits in self.limits.items()},
            "cells": [cell.to_json() for cell in self.cells.values()],
            "broken": self.broken,
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / FILE, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Results:
        """What is there, which may be nothing."""
        path = directory / FILE
        if not path.exists():
            return cls()
        data = json.loads(path.read_text())
        cells = [CellResult.from_json(cell) for cell in data["cells"]]
        return cls(
            machine=data["machine"],
            settings=data["settings"],
            limits={int(threads): Limits(**limits) for threads, limits in data["limits"].items()},
            cells={cell.key: cell for cell in cells},
            broken=data["broken"],
        )
