"""`moduleformer-ext train`."""

import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Group, Parameter
from pydantic import AfterValidator

from moduleformer_ext._version import __version__
from moduleformer_ext.cli import INTERRUPTED
from moduleformer_ext.cli.source import check_device
from moduleformer_ext.data import STANDARD_DOMAINS, check_sources, end_of_text_id, load_tokenizer, share_lanes
from moduleformer_ext.distributed import Processes, is_restart, joined, started_by_torchrun
from moduleformer_ext.records import Text
from moduleformer_ext.train import RunDirectory, Size, TrainConfig, is_run, run_session
from moduleformer_ext.train.config import RunOptions, read_options
from moduleformer_ext.train.metrics import check_logging
from moduleformer_ext.train.session import check_division, check_model

NEW_RUN = ("--run-dir", "--run")
"""torchrun takes the short one for its own, as it does --log."""
ConfigFile = Annotated[Path | None, Parameter(help="options as .json or .toml; flags win")]


def _check_assignment(item: str) -> str:
    if "=" not in item:
        raise ValueError(f"must be FIELD=VALUE, got '{item}'")
    return item


_GROUPS = {
    "text": "Text",
    "preset": "Model",
    "batch_size": "Batches",
    "aux_loss_weight": "Objective",
    "routing_loss_over": "Memory and processes",
    "steps": "Length",
    "learning_rate": "Optimiser",
    "dtype": "Machine",
    "seed": "Records",
}
"""The first option of every group in the help; those after it belong to it."""
HELP_GROUPS = {title: Group(title, sort_key=number) for number, title in enumerate(_GROUPS.values())}
_OTHER_NAMES = {"log": ("--log-to", "--log")}
Assignments = tuple[Annotated[Text, AfterValidator(_check_assignment)], ...]


@Parameter(name="*")
class Flags(RunOptions):
    """Options of a run, as flags."""

    model: Annotated[Assignments, Parameter(name="--model", group=HELP_GROUPS["Model"])] = ()
    """model configuration fields that replace those of the preset, as FIELD=VALUE"""

    def given(self, file: Path | None) -> dict[str, Any]:
        """The options of the file, with the flags that were given over them."""
        options = read_options(file) if file else {}
        flags = self.model_dump(mode="json", exclude_unset=True)
        if self.model:
            flags["model"] = {**options.get("model", {}), **dict(map(_parse_field, self.model))}
        return options | flags


def _group_options() -> None:
    title = ""
    for name in RunOptions.model_fields:
        title = _GROUPS.get(name, title)
        field = Flags.model_fields[name]
        field.metadata = [*field.metadata, Parameter(name=_OTHER_NAMES.get(name), group=HELP_GROUPS[title])]


_group_options()


def _parse_field(item: str) -> tuple[str, Any]:
    name, _, value = item.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a bare word is a string


def run(
    *,
    run: Annotated[Path | None, Parameter(name=NEW_RUN, help="folder of the new run")] = None,
    resume: Annotated[Path | None, Parameter(help="folder of a run to continue")] = None,
    config: ConfigFile = None,
    flags: Flags = Flags(),
) -> int:
    """Start or continue a run. Ctrl-C saves a checkpoint; go on with --resume RUN.

    Under torchrun several processes train one model: docs/distributed.md.
    """
    started = time.monotonic()
    given = flags.given(config)
    if (run is None) == (resume is None):
        raise ValueError("exactly one of --run-dir and --resume must be given")
    if resume is None and run is not None and is_restart() and is_run(run):
        resume, run = run, None  # torchrun repeats the command
    if resume is not None:
        directory = RunDirectory.open(resume)
        options = _continued(directory, given)
        check_device(options.device)
        return finish(options, started, lambda _: directory)
    assert run is not None
    if "tokenizer" in given and "vocab_size" in given:
        raise ValueError("--tokenizer: has a vocabulary of its own; leave --vocab-size out")
    options, new = TrainConfig.from_dict(given), run
    check_surroundings(options)
    tokenizer = None if options.tokenizer is None else load_tokenizer(Path(options.tokenizer))
    if tokenizer is None:
        architecture = options.architecture(options.vocab_size)
    else:
        architecture = options.architecture(tokenizer.get_vocab_size(), end_of_text_id(tokenizer))

    def create(processes: Processes) -> RunDirectory:
        check_model(architecture, options, processes)
        return RunDirectory.create(new, options)

    return start(options, started, create)


_OF_SEVERAL_PROCESSES = {
    "gather_dtype": "--gather-dtype",
    "reshard": "--no-reshard",
    "expert_parallel": "--expert-parallel",
    "background_checkpoints": "--background-checkpoints",
}
"""Options that one process alone has no use for, and their flags."""


def check_surroundings(config: TrainConfig) -> None:
    """Refuse what will not be found, before anything is written: other processes, texts, a device, packages, a lane for
    every domain.
    """
    for name, flag in _OF_SEVERAL_PROCESSES.items():
        if not started_by_torchrun() and getattr(config, name) != TrainConfig.model_fields[name].default:
            raise ValueError(f"{flag}: takes several processes; start them with torchrun, or leave it out")
    check_device(config.device)
    domains = check_sources(config.text) or STANDARD_DOMAINS
    share_lanes(dict.fromkeys(domains, 1), config.batch_size, config.domain_exponent)
    check_logging(config.log)


Find = Callable[[Processes], RunDirectory]


def start(config: TrainConfig, started: float, create: Find, sizes: Sequence[Size] = ()) -> int:
    """Take a new run to its end with the processes that torchrun started. One that cannot even begin leaves nothing."""
    made: list[RunDirectory] = []

    def create_once(processes: Processes) -> RunDirectory:
        made.append(create(processes))
        return made[0]

    try:
        return finish(config, started, create_once, sizes)
    except Exception:
        for directory in made:
            directory.discard()
        raise


def finish(config: TrainConfig, started: float, find: Find, sizes: Sequence[Size] = ()) -> int:
    """Take a run, which the first process finds or creates, to its end, with the processes that torchrun started; say
    how to go on if it was interrupted.
    """
    with joined(config.device) as processes:
        versions = {"version of moduleformer_ext": __version__, "version of torch": torch.__version__}
        processes.check_same({**versions, **config.to_dict()})
        check_division(config, processes)
        directory = RunDirectory(processes.first(lambda: find(processes).root), config)
        if run_session(directory, started=started, processes=processes, sizes=sizes):
            return 0
        if processes.is_first:
            print(f"continue with: moduleformer-ext train --resume {shlex.quote(str(directory.root))}")
    return INTERRUPTED


def _continued(directory: RunDirectory, given: dict[str, Any]) -> TrainConfig:
    """A run is continued as it began: options that say otherwise are an error, but for where experts are."""
    stored = directory.config.to_dict()
    options = TrainConfig.from_dict({**stored, **given})
    wanted = options.to_dict()
    different = [name for name in stored if stored[name] != wanted[name] and name != "expert_parallel"]
    if different:
        changes = "; ".join(f"{name} is {stored[name]!r}, got {wanted[name]!r}" for name in different)
        raise ValueError(
            f"--resume continues '{directory.root}' as it was configured, but {changes}; "
            f"leave these out, or start a new run"
        )
    return options
