"""tools/check_docs.py finds what a document names and the tree does not have, and nothing else."""

from pathlib import Path

import pytest

SOURCES = {
    "csrc/core/amx.cpp": "int tile_product(int rows);",
    "csrc/route/route_cpu.cpp": "",
    "python/package/ops/route.py": 'class RouteResult:\n    def as_tuple(self): ...\nNAME = "run.json"',
    "docs/ops/route.md": "",
    "tests/ops/test_route.py": "",
    "Makefile": "test-gpu: build\n",
}


@pytest.fixture
def tree(docs, tmp_path: Path):
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return docs.Tree(tmp_path, list(SOURCES))


def missing(docs, tree, text: str) -> list[str]:
    return [
        line.split(" names ")[1].removesuffix(", which does not exist") for line in docs.check(tree, "docs/x.md", text)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "`csrc/core/amx.cpp`, `core/amx.cpp`, `amx.cpp` and `csrc/core/`",
        "in csrc/core, without backticks",
        "`csrc/<op>/<op>_cpu.cpp`, tests/ops/test_X.py, `csrc/*/*_cpu.cpp`",
        "`csrc/{core,route}/`",
        "`run.json`, which a run writes",
        "`tile_product`, `mfx::tile_product()`, `RouteResult.as_tuple()`, `tile_*`",
        "`torch.library.opcheck` is not ours, x_s in `sum_s x_s` no name",
        "[the op](ops/route.md#errors), [elsewhere](https://example.org/a_b)",
        "`make test-gpu`",
        "```\nsome_example(of_code)\n```",
    ],
)
def test_what_exists_is_found(docs, tree, text):
    assert missing(docs, tree, text) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("`csrc/core/amx.hpp`", "csrc/core/amx.hpp"),
        ("in csrc/kernels, without backticks", "csrc/kernels"),
        ("`core/tiles.cpp`", "core/tiles.cpp"),
        ("tests/ops/bench_X.py", "tests/ops/bench_X.py"),
        ("`csrc/{core,router}/`", "csrc/router/"),
        ("`walk.json`", "walk.json"),
        ("`tile_sum`", "tile_sum"),
        ("`RouteResult.as_list()`", "RouteResult.as_list()"),
        ("`RouteOutput`", "RouteOutput"),
        ("`grid_*`", "grid_*"),
        ("[the op](ops/router.md)", "ops/router.md"),
        ("`make test-cpu`", "make test-cpu"),
    ],
)
def test_what_does_not_exist_is_named(docs, tree, text, name):
    assert missing(docs, tree, text) == [name]
