import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name: str) -> ModuleType:
    """The script tools/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def docs() -> ModuleType:
    return load_tool("check_docs")


@pytest.fixture(scope="session")
def layers() -> ModuleType:
    return load_tool("check_layers")


@pytest.fixture(scope="session")
def report() -> ModuleType:
    return load_tool("cuda_report")


@pytest.fixture(scope="session")
def hub() -> ModuleType:
    return load_tool("hub_build_toml")
