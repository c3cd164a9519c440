"""What the benchmarks add to pytest-benchmark: options, cases, a row per contestant, the machine's limits."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info
from torch import Tensor

from moduleformer_ext.heap import keep_freed_memory

from .inputs import MOLM_4B_K2, TINY, LayerShape
from .machine import NATIVE, CpuMeter, CudaMeter, Limits, Meter, clocks, describe, dtype_name, measure_limits
from .peers.apart import KINDS, Apart, version
from .race import OURS, CheckFailed, Contestant, Effort, Measured, Race, Run, measure

QUICK = {"threads": 1, "tokens": 32}
"""The most of each in a quick run."""
_RATIOS = "ratios"


def _peer_python(word: str) -> tuple[str, str]:
    kind, _, python = word.partition("=")
    if kind not in KINDS or not os.access(python, os.X_OK):
        raise argparse.ArgumentTypeError(f"must be KIND=PYTHON, KIND of {', '.join(KINDS)}, got {word}")
    return kind, python


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of moduleformer_ext")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure")
    group.addoption("--quick", action="store_true", help="tiny shapes: does everything run?")
    group.addoption("--missing", action="store_true", help="only cells that the file of --benchmark-json lacks")
    group.addoption("--isa", default=NATIVE, help="what this process was restricted to; a label of its rows")
    group.addoption(
        "--peer-python",
        type=_peer_python,
        action="append",
        default=[],
        metavar="KIND=PYTHON",
        help=f"the Python that has a peer of another environment ({', '.join(KINDS)})",
    )
    group.addoption("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no cell later than this")


class Session:
    """What is known about the machine and what has gone wrong so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.device: str = config.getoption("device")
        self.quick: bool = config.getoption("quick")
        self.shape = TINY if self.quick else MOLM_4B_K2
        self.deadline = time.monotonic() + config.getoption("budget")
        least = config.getoption("benchmark_min_rounds")
        self.effort = Effort(float(config.getoption("benchmark_max_time")), least, 5 * least)
        path = config.getoption("benchmark_json")
        known = json.loads(path.read_text()) if path is not None and path.exists() and path.stat().st_size else {}
        self.known: dict[str, Any] = {"benchmarks": [], "failures": {}, "limits": {}, **known}
        self.failures: dict[str, str] = {}
        self.limits: dict[int, Limits] = {}
        self.machine = describe(self.device, {kind: version(python, kind) for kind, python in _pythons(config).items()})
        self.commit = get_commit_info()
        self.before = clocks() if self.device == "cuda" else {}

    def meter(self, threads: int) -> Meter:
        return CudaMeter() if self.device == "cuda" else CpuMeter(threads)

    def limits_of(self, threads: int, meter: Meter) -> Limits:
        """Measured when first asked for, close to the cells that they are compared with."""
        if threads not in self.limits:
            n = 128 if self.quick else 8192 if self.device == "cuda" else 1024
            self.limits[threads] = measure_limits(meter, budget=0.01 if self.quick else 0.3, n=n)
        return self.limits[threads]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this torch sees no GPU")
    config.stash[_SESSION] = Session(config)


_SESSION = pytest.StashKey[Session]()


def pytest_sessionstart(session: pytest.Session) -> None:
    keep_freed_memory(one_arena=True)


def _word(name: str, value: object) -> str:
    """An argument of a case as a part of its name, by which `-k` selects."""
    if name == "threads":
        return {0: "gpu", 1: "1thread"}.get(value, f"{value}threads")
    if name == "tokens":
        return f"T{value}"
    return f"{value}{name}" if type(value) is int else str(value)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The arguments that the mark `cases` gives for the device."""
    mark = metafunc.definition.get_closest_marker("cases")
    if mark is None:
        return
    session = metafunc.config.stash[_SESSION]
    names, rows = mark.args[0].split(), mark.kwargs[session.device]
    if session.quick:
        most = [QUICK.get(name, math.inf) for name in names]
        rows = dict.fromkeys(
            tuple(
                min(value, limit) if isinstance(value, int) else value for value, limit in zip(row, most, strict=True)
            )
            for row in rows
        )
    elif len(set(rows)) < len(rows):
        raise pytest.UsageError(f"{metafunc.definition.nodeid} has a case twice")
    ids = ["-".join(_word(*pair) for pair in zip(names, row, strict=True)) for row in rows]
    metafunc.parametrize(names, list(rows), ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("missing"):
        known = {row["extra_info"]["cell"] for row in config.stash[_SESSION].known["benchmarks"]}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
        items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[_SESSION].deadline:
        pytest.skip("the budget is spent")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    yield
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        item.config.stash[_SESSION].failures[item.nodeid] = call.excinfo.exconly().splitlines()[0]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """The ratios to ours in place of PASSED."""
    ratios = dict(report.user_properties).get(_RATIOS)
    return ("passed", ".", str(ratios)) if report.when == "call" and report.passed and ratios else None


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, object]:
    session = config.stash[_SESSION]
    if not session.before:
        return session.machine
    return {**session.machine, "before": session.before, "after": clocks()}


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, object]:
    return config.stash[_SESSION].commit  # asked for after every cell


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Adds the limits, what failed, and what the file had of other cells."""
    session = config.stash[_SESSION]
    rows = output_json["benchmarks"]
    done = {row["extra_info"]["cell"] for row in rows} | set(session.failures)
    rows[:0] = [row for row in session.known["benchmarks"] if row["extra_info"]["cell"] not in done]
    output_json["failures"] = {
        **{cell: why for cell, why in session.known["failures"].items() if cell not in done},
        **session.failures,
    }
    output_json["limits"] = session.known["limits"] | {
        str(threads): vars(limits) for threads, limits in session.limits.items()
    }
    output_json |= {"isa": config.getoption("isa"), "quick": session.quick, "shape": vars(session.shape)}


@pytest.fixture(scope="session")
def shape(request: pytest.FixtureRequest) -> LayerShape:
    return request.config.stash[_SESSION].shape


PeersApart = Callable[[Mapping[str, str], Mapping[str, Tensor]], list[Contestant]]


@pytest.fixture
def peers_apart(request: pytest.FixtureRequest, threads: int) -> Iterator[PeersApart]:
    """Makes contestants of peers in processes of their own, as far as `--peer-python` names a Python for them: from
    precisions by kind, and the inputs of :class:`Apart`.
    """
    pythons = _pythons(request.config)
    started: list[Apart] = []

    def contestants(precisions: Mapping[str, str], inputs: Mapping[str, Tensor]) -> list[Contestant]:
        made = []
        for kind, precision in precisions.items():
            if kind in pythons:
                started.append(Apart(pythons[kind], kind, precision, threads, inputs))
                made.append(started[-1].contestant(f"{kind}, {precision}"))
        return made

    yield contestants
    for apart in started:
        apart.close()


def _pythons(config: pytest.Config) -> dict[str, str]:
    """Those of peers apart. These have no switch for an instruction set, so that a restricted run is without them."""
    return dict(config.getoption("peer_python")) if config.getoption("isa") == NATIVE else {}


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Which peers this run is without."""
    missing = [kind for kind in KINDS if kind not in _pythons(config)]
    why = f"no --peer-python KIND=PYTHON, or an --isa other than {NATIVE}"
    return [f"without {' and '.join(missing)}: {why}"] if missing else []


def _record(benchmark: Any, name: str, measured: Measured, info: dict[str, Any]) -> None:
    """A row of pytest-benchmark, which has one per test, for one contestant of a test."""
    row = benchmark._make_stats(1)
    row.name, row.fullname, row.group = name, f"{row.fullname} {name}", info["cell"].rpartition("::")[2]
    row.params = None
    clocks = measured.rounds[0]
    row.extra_info = {
        **info,
        "contestant": name,
        "comparable": measured.comparable,
        "error": measured.error,
        "memory": measured.memory,
        "seconds": {clock: statistics.median(seconds[clock] for seconds in measured.rounds) for clock in clocks},
    }
    for seconds in measured.times:
        row.update(seconds)


@pytest.fixture
def run(request: pytest.FixtureRequest, benchmark: Any, threads: int) -> Iterator[Run]:
    """Runs a race and hands its figures to pytest-benchmark. With no threads it is the GPU's, and tensors are made
    there.
    """
    config, session = request.config, request.config.stash[_SESSION]
    meter = session.meter(threads)
    benchmark._mode = "race"  # it has been used

    def run(race: Race) -> None:
        benchmark.has_error = True  # until there are figures
        try:
            ran, left_out = measure(race, meter, session.effort)
        except CheckFailed:
            benchmark._make_stats(1)  # empty: that something failed is saved also where nothing succeeds
            raise
        benchmark.has_error = False
        least = session.limits_of(threads, meter).seconds(race.work)
        info = {
            "cell": request.node.nodeid,
            "section": benchmark.group or request.node.originalname,
            "case": request.node.callspec.id.partition("-")[2].replace("-", ", "),
            "threads": threads,
            "isa": config.getoption("isa"),
            "dtype": dtype_name(race.work.dtype),
            "flops": race.work.flops,
            "limit": least,
        }
        goals = {} if session.quick else race.goals
        of_ours = {"facts": race.facts, "goals": goals, "left_out": left_out}
        medians = {name: statistics.median(measured.times) for name, measured in ran.items()}
        for name, measured in ran.items():
            of_limit = least / medians[name] if least else None
            _record(benchmark, name, measured, {**info, "of_limit": of_limit, **(of_ours if name == OURS else {})})
        ratios = (f"{name} {median / medians[OURS]:.2f}x" for name, median in medians.items() if name != OURS)
        request.node.user_properties.append((_RATIOS, ", ".join(ratios)))

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    else:
        torch.set_default_device("cuda")
    yield run
    torch.set_num_threads(before)
    torch.set_default_device(None)  # a default device, whichever, costs every call of torch a microsecond or more
    if config.getoption("benchmark_json") is not None:
        config._benchmarksession.handle_saving()  # after every cell: a crash loses one
