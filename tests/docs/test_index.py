"""Lists in the documentation are whole, and the page that an index of packages shows has no links that lead nowhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_example_is_listed() -> None:
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(\.\./examples/(\w+)\.py\)", page)) == {
        path.stem for path in (ROOT / "examples").glob("*.py")
    }


def test_every_op_is_in_the_table_of_drop_ins() -> None:
    from moduleformer_ext import ops

    page = (ROOT / "docs/drop_ins.md").read_text(encoding="utf-8")
    table = page[page.index("| op |") : page.index("They take and give")]
    family = {"route_topk_linear", "route_topk_mlp", "route_topk_gmm"}
    assert set(re.findall(r"^\| \[`(\w+)`\]", table, re.MULTILINE)) == set(ops.__all__) - family


def test_every_extra_is_explained() -> None:
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    rows = (ROOT / "docs/install.md").read_text(encoding="utf-8").split("| extra | for |")[1].split("\n\n")[0]
    named = [name for row in rows.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(re.findall(r"^(\w+) =", extras, re.MULTILINE))


@pytest.fixture(scope="module")
def package_page() -> str:
    command = [sys.executable, "setup.py", "-q", "--long-description"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_package_page_has_no_relative_links(package_page: str) -> None:
    links = re.findall(r"\]\(([^)]*)\)|(?:href|src)=\"([^\"]*)\"", package_page)
    assert links
    assert all(link.startswith("https://") for pair in links for link in pair if link)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source distribution has no results of benchmarks")
def test_what_the_package_page_names_is_there(package_page: str) -> None:
    paths = re.findall(r"`((?:docs|benchmarks)/[^`]+|[A-Z]+\.md)`", package_page)
    assert len(paths) > 10
    assert all((ROOT / path).exists() for path in paths)
