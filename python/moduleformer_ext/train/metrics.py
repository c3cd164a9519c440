"""metrics.jsonl: one JSON object a line, appended as training goes; on demand the same figures for TensorBoard."""

import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moduleformer_ext.files import write_file, writing


def check_logging(kinds: Sequence[str]) -> None:
    """Raise an ImportError that says what to install if a package for one of the kinds of logs is missing."""
    if "tensorboard" in kinds and importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "--log tensorboard needs a package; install it with: pip install 'moduleformer_ext[tensorboard]'"
        )


class MetricsLog:
    """Appends records; `rewind` drops those of steps that a resumed run will take again.

    Args:
        path: of metrics.jsonl.
        tensorboard: a folder for TensorBoard's events, of the same figures; None for none.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path = path
        self._events = None if tensorboard is None else _Events(tensorboard)

    def append(self, **record: Any) -> None:
        """Write one record."""
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._events is not None:
            self._events.append(record)

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
        if self._events is not None:
            self._events.purge_step = step + 1


class _Events:
    """A folder of TensorBoard; its figures are named `<event>/<field>`, those of fields in fields with more slashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.purge_step = 0
        self._writer: Any = None

    def append(self, record: Mapping[str, Any]) -> None:
        with writing(self.folder):
            if self._writer is None:
                check_logging(["tensorboard"])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of protobuf and distutils
                    from torch.utils.tensorboard import SummaryWriter
                self._writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)
            figures = {name: value for name, value in record.items() if name not in ("event", "step")}
            for name, value in _scalars(figures, str(record.get("event", "metrics"))):
                self._writer.add_scalar(name, value, int(record.get("step", 0)))
            self._writer.flush()


def _scalars(figures: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}/{name}", value
