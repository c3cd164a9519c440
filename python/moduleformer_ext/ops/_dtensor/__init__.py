"""The ops for DTensors: which placements each of them takes, and what it does with them (docs/dtensor.md).

Importing this costs nothing: the rules are read once torch.distributed.tensor is imported, by whomever.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_DTENSOR = "torch.distributed.tensor"


def register_once_imported() -> None:
    """Register the rules: now if there are DTensors already, else as soon as there are."""
    if sys.modules.get(_DTENSOR) is not None:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    from moduleformer_ext.ops._dtensor import rules

    rules.register()


class _Watch(MetaPathFinder):
    """Finds torch.distributed.tensor where everyone else does, and registers the rules once it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _DTENSOR or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:  # whatever else a loader may be asked for
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
