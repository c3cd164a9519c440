"""Host code of csrc as a library of C functions."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """tests/core/*.cpp, compiled in the build folder of the extension."""
    build = Path(os.environ.get("MFX_BUILD_DIR", ROOT / "build" / f"native-{sys.implementation.cache_tag}"))
    if not (build / "CMakeCache.txt").exists():
        pytest.skip(f"needs the build folder {build}; `make build` makes it")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake, "cmake is missing"
    subprocess.run([cmake, "--build", build, "--target", "core_primitives"], check=True, capture_output=True)
    return ctypes.CDLL(str(build / "tests" / "core" / "libcore_primitives.so"))
