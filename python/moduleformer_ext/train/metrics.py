"""metrics.jsonl: one JSON object a line, appended as training goes."""

import json
from pathlib import Path
from typing import Any

from moduleformer_ext.files import write_file, writing


class MetricsLog:
    """Appends records; `rewind` drops those of steps that a resumed run will take again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **record: Any) -> None:
        """Write one record."""
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a line cut short by a kill is left out."""
        records = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def rewind(self, step: int) -> None:
        """Keep only the records up to `step`."""
        kept = [record for record in self.read() if record.get("step", 0) <= step]
        write_file(self.path, "".join(json.dumps(record) + "\n" for record in kept))
