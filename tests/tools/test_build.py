"""What setup.py and the Makefile ask for: a folder copied with its build folder and environment builds as a fresh one
does, and an earlier build leaves no settings behind."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake_cmake(tmp_path: Path) -> Path:
    """A folder whose cmake writes its arguments down, a call a line, to `calls` beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "cmake"
    script.write_text(f'#!/bin/sh\necho "$@" >>{folder}/calls\n')
    script.chmod(0o755)
    return folder


def configure(fake_cmake: Path, build: Path, home: Path, cache_folder: Path) -> str:
    """How setup.py configures a build folder that was made in `cache_folder` for the sources in `home`."""
    build.mkdir(exist_ok=True)
    (build / "CMakeCache.txt").write_text(
        f"//For build in directory: {cache_folder}\nCMAKE_CACHEFILE_DIR:INTERNAL={cache_folder}\n"
        f"CMAKE_HOME_DIRECTORY:INTERNAL={home}\n"
    )
    env = {**os.environ, "PATH": f"{fake_cmake}:{os.environ['PATH']}", "MFX_BUILD_DIR": str(build)}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "-b", str(build)], cwd=ROOT, env=env, check=True)
    return (fake_cmake / "calls").read_text().splitlines()[0]


def test_a_build_folder_of_other_sources_is_configured_afresh(fake_cmake, tmp_path):
    build = tmp_path / "build"
    assert "--fresh" in configure(fake_cmake, build, Path("/elsewhere"), build).split()


def test_a_build_folder_made_elsewhere_is_configured_afresh(fake_cmake, tmp_path):
    build = tmp_path / "build"
    assert "--fresh" in configure(fake_cmake, build, ROOT, Path("/elsewhere/build")).split()


def test_a_build_folder_of_these_sources_is_kept(fake_cmake, tmp_path):
    build = tmp_path / "build"
    assert "--fresh" not in configure(fake_cmake, build, ROOT, build).split()


def test_what_is_not_set_returns_to_its_default(fake_cmake, tmp_path, monkeypatch):
    monkeypatch.setenv("MFX_CUDA", "OFF")
    monkeypatch.delenv("MFX_NATIVE", raising=False)
    arguments = configure(fake_cmake, tmp_path / "build", ROOT, tmp_path / "build").split()
    assert "-DMFX_CUDA=OFF" in arguments
    assert "-UMFX_NATIVE" in arguments


def test_cmake_of_an_environment_that_is_not_activated_is_found(fake_cmake, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    (fake_cmake / "cmake").rename(environment / "bin" / "cmake")
    env = {"PATH": str(fake_cmake), "PYTHONPATH": str(Path(setuptools.__file__).parents[1])}
    command = [environment / "bin" / "python", "setup.py", "-q", "build_ext", "-b", tmp_path / "build"]
    subprocess.run(command, cwd=ROOT, env={**env, "MFX_BUILD_DIR": str(tmp_path / "build")}, check=True)
    assert (fake_cmake / "calls").exists()


@pytest.mark.parametrize("built", [True, False])
def test_the_demo_is_built_for_this_machine_until_everything_has_been(tmp_path, built):
    everything = tmp_path / "everything"
    if built:
        everything.touch()
    command = ["make", "--dry-run", f"VENV={tmp_path / '.venv'}", f"EVERYTHING={everything}", "demo"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFX_NATIVE")}
    plan = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert ("build MFX_NATIVE=1" in plan) != built
    assert (f"touch {everything}" in plan) == built


@pytest.mark.parametrize("copied", [True, False])
def test_a_copied_environment_is_made_anew(tmp_path, copied):
    venv = tmp_path / ".venv"
    venv.mkdir()
    (venv / ".made-by-make_venv").write_text(f"{tmp_path / 'elsewhere' if copied else venv}\n")
    (venv / ".installed").touch()
    command = ["make", "--dry-run", f"VENV={venv}", str(venv / ".installed")]
    plan = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert ("tools/make_venv.sh" in plan) == copied


def test_a_wheel_holds_the_benchmarks(tmp_path: Path) -> None:
    """`moduleformer-ext bench` finds them without a checkout; no results and no experiments come along."""
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "-d", str(tmp_path)], cwd=ROOT, check=True)
    package = tmp_path / "moduleformer_ext"
    found = {path.relative_to(package / "benchmarks").as_posix() for path in (package / "benchmarks").rglob("*.*")}
    assert {"__main__.py", "conftest.py", "pytest.ini", "ops/bench_grouped_gemm.py", "peers/experts.py"} <= found
    assert not any(name.startswith(("results", "experiments")) for name in found)
    for library in (ROOT / "python" / "moduleformer_ext").glob("*.so"):
        (package / library.name).symlink_to(library)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = ["bench", "linear_decode", "--quick", "--select", "fp32 and T1 and head", "--json"]
    command = [sys.executable, "-m", "moduleformer_ext.cli", *words]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{package / 'benchmarks'}" in result.stderr  # pytest's root
    assert '"case": "fp32, T1, head"' in result.stdout
