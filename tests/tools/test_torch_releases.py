"""The releases of torch that are served stand in files of several formats: all of them name the same."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MATRIX = re.findall(
    r'"(\d+\.\d+)"', re.search(r"torch: \[(.*)\]", (ROOT / ".github/workflows/wheels.yml").read_text())[1]
)


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("pyproject.toml", r"requires = .*torch>=([\d.]+)"),
        ("pyproject.toml", r"dependencies = .*torch>=([\d.]+)"),
        ("requirements-dev.txt", r"torch>=([\d.]+)"),
        ("docs/build.md", r"# ([\d.]+) to "),
        ("docs/install.md", r"\| torch ([\d.]+) \|"),
        ("csrc/bindings/torch_compat.hpp", r"compile against, ([\d.]+) to "),
        ("tools/check_torch.sh", r"set -- (\d+\.\d+)"),
    ],
)
def test_the_oldest(file, pattern):
    assert re.search(pattern, (ROOT / file).read_text())[1] == MATRIX[0]


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("docs/build.md", r"# [\d.]+ to ([\d.]+),"),
        ("docs/install.md", r"(?s)\| torch ([\d.]+) \|(?!.*\| torch [\d.]+ \|)"),
        ("csrc/bindings/torch_compat.hpp", r"compile against, [\d.]+ to ([\d.]+),"),
        ("tools/check_torch.sh", r"set -- \S+ (\d+\.\d+)"),
    ],
)
def test_the_newest(file, pattern):
    assert re.search(pattern, (ROOT / file).read_text())[1] == MATRIX[-1]
