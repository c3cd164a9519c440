"""The kernels that the environment chooses, which a process asks once."""

import os
import subprocess
import sys

import pytest


def run_with(environment: dict[str, str], code: str) -> str:
    """Run code, which can import what is beside this file, in a process with these variables: MFX_CPU_ISA, MFX_BRGEMM.
    Returns its output; skips where the instruction set is not compiled in or not in this processor.
    """
    paths = os.pathsep.join((os.path.dirname(__file__), *sys.path))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    if "compiled in and within what this processor has" in result.stderr:
        pytest.skip(f"{environment['MFX_CPU_ISA']} is not available here")
    assert result.returncode == 0, result.stderr
    return result.stdout
