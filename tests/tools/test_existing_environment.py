"""`make ... PY=python3` and tools/gpu_proof.sh: an environment that is there is used as it is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("missing_packages", ROOT / "tools" / "missing_packages.py")
missing_packages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(missing_packages)


@pytest.mark.parametrize(
    ("requirement", "answer"),
    [
        ("torch>=2", None),
        ("no-such-package>=1", "no-such-package>=1"),
        ("torch>=99", "torch>=99 (here: "),
    ],
)
def test_what_is_missing_or_too_old_is_named(requirement, answer):
    found = missing_packages.lacking(Requirement(requirement))
    assert found == answer if answer is None else found.startswith(answer)


def test_a_program_on_the_path_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(missing_packages, "PROGRAMS", {"no-such-program"})
    assert missing_packages.lacking(Requirement("no-such-program")) == "no-such-program"
    (tmp_path / "no-such-program").write_text("#!/bin/sh\n")
    (tmp_path / "no-such-program").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_packages.lacking(Requirement("no-such-program")) is None


def test_groups_are_those_of_the_project_and_markers_hold():
    project = {
        "build-system": {"requires": ["cmake"]},
        "project": {
            "dependencies": ["torch", "tomli; python_version < '3'"],
            "optional-dependencies": {"test": ["pytest"]},
        },
    }
    names = [requirement.name for requirement in missing_packages.requirements(project, ["build", "runtime", "test"])]
    assert names == ["cmake", "torch", "pytest"]
    with pytest.raises(SystemExit, match="must be one of build, runtime, test, got 'tests'"):
        list(missing_packages.requirements(project, ["tests"]))


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "PY")}
    return subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("target", "groups"), [("test", "runtime test"), ("test-gpu", "test"), ("bench", "runtime bench"), ("lint", "lint")]
)
def test_a_given_python_is_asked_what_it_has_and_nothing_is_installed(target, groups):
    plan = make(f"PY={sys.executable}", target)
    assert plan.returncode == 0, plan.stderr
    assert f"{sys.executable} tools/missing_packages.py build {groups}\n" in plan.stdout
    assert "pip install" not in plan.stdout
    assert "make_venv" not in plan.stdout


@pytest.mark.parametrize("program", ["no-such-python", "/tmp", "ls"])
def test_a_given_python_must_be_one(program):
    plan = make(f"PY={program}", "test")
    assert plan.returncode != 0
    assert f"PY={program} is no Python" in plan.stderr


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  '-c '*xdist*) echo 0 ;;
  'setup.py '*) {build} ;;
  '-m pytest '*) echo 'ran tests'; {tests} ;;
  '-m benchmarks '*) echo 'ran benchmarks' ;;
esac
"""


@pytest.fixture
def proof(tmp_path: Path):
    """Runs the script with a Python and a sanitizer that only say how they were called."""

    def run(build: str = "true", tests: str = "true", sanitizer: str = "true"):
        programs = {
            "python3": FAKE_PYTHON.format(build=build, tests=tests),
            "compute-sanitizer": f"#!/bin/sh\n{sanitizer}\n",
        }
        for name, text in programs.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        environment.pop("MFX_PROOF_DEVICE", None)
        out = tmp_path / "a folder"
        result = subprocess.run(
            ["tools/gpu_proof.sh", tmp_path / "python3", out], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        stages = [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]
        return result, {stage["stage"]: stage["status"] for stage in stages}, out

    return run


def test_the_proof_runs_every_stage_within_nine_minutes(proof):
    result, stages, out = proof()
    assert result.returncode == 0, result.stderr
    assert stages == {"build": 0, "tests": 0, "sanitizer": 0, "benchmarks": 0}
    assert sum(json.loads(line)["limit"] for line in (out / "stages.jsonl").read_text().splitlines()) <= 540
    assert "| benchmarks | passed |" in (out / "table.md").read_text()
    assert (out / "tests.log").read_text() == "ran tests\n"


@pytest.mark.parametrize("broken", ["tests", "sanitizer"])
def test_a_stage_that_fails_stops_no_other(proof, broken):
    result, stages, out = proof(**{broken: "exit 3"})
    assert result.returncode == 1
    assert {name for name, status in stages.items() if status} == {broken}
    assert "benchmarks" in stages
    assert f"| {broken} | failed" in (out / "table.md").read_text()


def test_without_a_build_nothing_follows(proof):
    result, stages, _ = proof(build="exit 1")
    assert result.returncode == 1
    assert list(stages) == ["build"]
