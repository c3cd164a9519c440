"""Names the packages that pyproject.toml asks for and this Python lacks: ``python tools/missing_packages.py GROUP...``.

A group is ``build`` (what a build needs), ``runtime`` (what the package needs) or an optional dependency's name. Exit
status 1 if anything is missing or too old; nothing is installed. For ``make ... PY=python3`` (docs/build.md).
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from packaging.requirements import Requirement
except ImportError:  # a fresh environment, where it is pip that brings one
    from pip._vendor.packaging.requirements import Requirement
if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PROGRAMS = {"cmake", "ninja"}
"""Packages of which the program alone is used, wherever it comes from."""


def requirements(project: dict[str, Any], groups: list[str]) -> Iterator[Requirement]:
    """What the groups ask for, here: markers are evaluated."""
    known = {"build": project["build-system"]["requires"], "runtime": project["project"]["dependencies"]}
    known |= project["project"]["optional-dependencies"]
    for group in groups:
        if group not in known:
            sys.exit(f"missing_packages: group must be one of {', '.join(known)}, got {group!r}")
        for text in known[group]:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement


def lacking(requirement: Requirement) -> str | None:
    """The requirement, and what is here instead, unless it is met."""
    if requirement.name in PROGRAMS and shutil.which(requirement.name):
        return None
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return str(requirement)
    met = requirement.specifier.contains(version, prereleases=True)
    return None if met else f"{requirement} (here: {version})"


def main(groups: list[str]) -> int:
    if not groups:
        sys.exit("missing_packages: name a group")
    with open(Path(__file__).parents[1] / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    missing = sorted({text for requirement in requirements(project, groups) if (text := lacking(requirement))})
    if missing:
        print(f"{sys.executable} lacks: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
