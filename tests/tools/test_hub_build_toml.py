"""tools/hub_build_toml.py lists every kernel, and the hub's own parser takes what it writes."""

from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def test_every_source_is_in_one_table(hub: ModuleType) -> None:
    sources = [source for table in hub.tables().values() for source in table.get("src", ())]
    there = [path.relative_to(ROOT).as_posix() for kind in ("cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{kind}")]
    on_cutlass = [path for path in there if path.endswith("_sm90_cuda.cu")]
    assert sorted([*sources, "csrc/bindings/module.cpp", *on_cutlass]) == sorted(there)


def test_the_parser_of_the_hub_takes_it(hub: ModuleType, tmp_path: Path) -> None:
    parser = pytest.importorskip("kernels._rust")
    assert hub.main([str(tmp_path)]) == 0
    assert [str(backend) for backend in parser.Build.open(tmp_path).general.backends] == ["cpu", "cuda"]


def test_what_is_written_is_toml(hub: ModuleType, tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    hub.main([str(tmp_path)])
    written = tomllib.loads((tmp_path / "build.toml").read_text())
    kernels = written.pop("kernel")
    assert {**written, **{f"kernel.{name}": table for name, table in kernels.items()}} == hub.tables()
