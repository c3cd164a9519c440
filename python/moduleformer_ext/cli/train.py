"""`moduleformer-ext train`."""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from moduleformer_ext.train import RunDirectory, TrainConfig, run_session
from moduleformer_ext.train.config import default_of, read_options

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: every field of `TrainConfig` is a flag."""
    parser.epilog = "Flags override --config. Ctrl-C saves a checkpoint; go on with --resume RUN."
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run", type=Path, metavar="RUN", help="folder of the new run")
    where.add_argument("--resume", type=Path, metavar="RUN", help="folder of a run to continue")
    parser.add_argument("--config", type=Path, metavar="FILE", help="options as .json or .toml")
    add_config_flags(parser)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per config field; those not given leave no trace in the namespace."""
    group = parser.add_argument_group("options of a run")
    for option in dataclasses.fields(TrainConfig):
        default = default_of(option)
        kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": option.metadata["help"]}
        if isinstance(default, tuple):
            kwargs |= {"nargs": "+", "metavar": "PATH"}
        elif isinstance(default, bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, dict):
            kwargs |= {"nargs": "+", "metavar": "FIELD=VALUE"}
        else:
            kwargs |= {"type": type(default), "metavar": option.name.upper()}
            kwargs["help"] += f" (default: {default})"
        group.add_argument(f"--{option.name.replace('_', '-')}", dest=option.name, **kwargs)


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """The config fields that were given as flags."""
    names = {option.name for option in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    if "model" in given:
        given["model"] = dict(_parse_field(item) for item in given["model"])
    return given


def _parse_field(item: str) -> tuple[str, Any]:
    name, separator, value = item.partition("=")
    if not separator:
        raise ValueError(f"--model: expected FIELD=VALUE, got '{item}'")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a bare word is a string


def run(options: argparse.Namespace) -> int:
    """Start or continue a run."""
    started = time.monotonic()
    given = read_given(options)
    if options.resume:
        directory = RunDirectory.open(options.resume)
        _check_same(directory, given)
    else:
        directory = RunDirectory.create(options.run, TrainConfig.from_dict(given))
    return finish(directory, started)


def read_given(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the file, with those of the flags over them."""
    given = read_options(options.config) if options.config else {}
    flags = given_options(options)
    if "model" in flags and isinstance(given.get("model"), dict):
        flags["model"] = {**given["model"], **flags["model"]}
    return given | flags


def finish(directory: RunDirectory, started: float) -> int:
    """Take a run to its end and say how to go on if it was interrupted."""
    if run_session(directory, started=started):
        return 0
    print(f"continue with: moduleformer-ext train --resume {directory.root}")
    return INTERRUPTED


def _check_same(directory: RunDirectory, given: dict[str, Any]) -> None:
    """A run is continued as it began: options that say otherwise are an error."""
    stored = directory.config.to_dict()
    wanted = TrainConfig.from_dict({**stored, **given}).to_dict()
    if different := [name for name in stored if stored[name] != wanted[name]]:
        changes = "; ".join(f"{name} is {stored[name]!r}, got {wanted[name]!r}" for name in different)
        raise ValueError(
            f"--resume continues '{directory.root}' as it was configured, but {changes}; "
            f"leave these out, or start a new run"
        )
