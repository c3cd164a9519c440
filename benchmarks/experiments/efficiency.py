"""Experiment 6: efficiency (the paper's Table 2): MoLM against dense models of equal quality.

    python -m benchmarks.experiments.efficiency                 # the trained models of experiment 1
    python -m benchmarks.experiments.efficiency --paper         # the paper's sizes, random weights, bfloat16
    python -m benchmarks.experiments.efficiency --paper --device cuda

Quality is measured for the trained models; for the paper's sizes its own pairs are taken, which are near in quality
(published Wikitext perplexities: MoLM-4B-K2 15.15, Pythia-1.4B 14.71; MoLM-8B-K2 12.97, Pythia-2.8B 12.68). Every
contestant runs in a process of its own, for its peak of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from moduleformer_ext.heap import keep_freed_memory
from moduleformer_ext.models import MoLMConfig

from .baselines import DenseConfig, Model, active_parameters
from .cells import Result, make_model
from .language_modelling import generate
from .report import COLOURS, markdown_table, new_figure, save_figure, verdict, write_report
from .setting import Setting, make_parser, make_setting

PAPER_PAIRS = {
    "molm-4b-k2": DenseConfig(vocab_size=50304, n_embd=2048, n_layer=24, n_head=16, ffd_hidden=8192),
    "molm-8b-k2": DenseConfig(vocab_size=50304, n_embd=2560, n_layer=32, n_head=32, ffd_hidden=10240),
}
"""A preset -> the shape of the dense model that it is near to in quality: Pythia-1.4B and Pythia-2.8B."""
_ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the report."""
    parser = make_parser("efficiency", "Latency, memory and throughput of MoLM and dense models.")
    parser.add_argument("--paper", action="store_true", help="the paper's sizes with random weights")
    parser.add_argument("--preset", default="molm-4b-k2", choices=sorted(PAPER_PAIRS), help="with --paper")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one contestant, in the process made for it
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that this torch sees")
    if options.measure:
        torch.set_num_threads(options.threads)
        before = _peak_bytes(options.device)
        found = measure(load(options, options.measure), options)
        print(json.dumps({**found, "peak_bytes": _peak_bytes(options.device) - before}))
        return
    name = f"efficiency-{options.preset}" if options.paper else "efficiency"
    setting = make_setting(name, options)
    if options.paper:
        report_paper(setting, options)
    else:
        report_trained(setting, options)


def _lengths(options: argparse.Namespace) -> tuple[int, int]:
    """Tokens of the prompt, and tokens generated after it."""
    return (64, 4) if options.quick else (512, 32)


def load(options: argparse.Namespace, contestant: str) -> Model:
    """A trained model, or one of the paper's size: ``molm`` or ``dense``."""
    if not options.paper:
        return make_setting("efficiency", options).cells.model(contestant, options.seeds[0]).to(options.device)
    if options.quick:
        small = MoLMConfig.preset("molm-nano")
        config = small if contestant == "molm" else DenseConfig(1024, 128, 2, 2, 512)
    else:
        config = MoLMConfig.preset(options.preset) if contestant == "molm" else PAPER_PAIRS[options.preset]
    # Made in bfloat16: in float32 the larger ones would not fit where they are to run.
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options.device):
            return make_model(contestant, config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def measure(model: Model, options: argparse.Namespace) -> Result:
    """Seconds for reading a prompt and for each token generated after it, and the size of the weights."""
    keep_freed_memory()
    prompt_length, new_tokens = _lengths(options)
    prompt = torch.randint(model.config.vocab_size, (1, prompt_length), device=options.device)
    read = _median_seconds(lambda: model(prompt), options.device)
    both = _median_seconds(lambda: generate(model, prompt, new_tokens), options.device)
    first = _median_seconds(lambda: generate(model, prompt, 1), options.device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "read_seconds": read,
        "token_seconds": (both - first) / (new_tokens - 1),
        "read_tokens_per_second": prompt_length / read,
        "weight_bytes": weights,
    }


def _peak_bytes(device: str) -> int:
    """The most memory that was in use so far: of the GPU, or of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _median_seconds(call: Callable[[], object], device: str) -> float:
    cuda = torch.device(device).type == "cuda"
    times = []
    for _ in range(_ROUNDS + 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _in_own_process(options: argparse.Namespace, contestant: str) -> Result:
    command = [sys.executable, "-m", "benchmarks.experiments.efficiency", "--measure", contestant]
    command += ["--out", str(options.out), "--threads", str(options.threads), "--device", options.device]
    command += ["--preset", options.preset, "--seeds", *map(str, options.seeds)]
    command += ["--quick"] * options.quick + ["--paper"] * options.paper
    if options.results:
        command += ["--results", str(options.results)]
    if options.text:
        command += ["--text", *options.text]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


_COLUMNS = ("read [tokens/s]", "latency of a prompt [ms]", "generation [tokens/s]", "weights [MB]", "peak memory [MB]")


def _row(title: str, found: Result, *more: str) -> list[str]:
    return [
        title,
        f"{found['parameters'] / 1e6:.2f}",
        *more,
        f"{found['read_tokens_per_second']:.0f}",
        f"{1e3 * found['read_seconds']:.1f}",
        f"{1 / found['token_seconds']:.1f}",
        f"{found['weight_bytes'] / 1e6:.0f}",
        f"{found['peak_bytes'] / 1e6:.0f}",
    ]


def _conditions(options: argparse.Namespace) -> str:
    on_gpu = torch.device(options.device).type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{options.threads} CPU threads"
    prompt_length, new_tokens = _lengths(options)
    return (
        f"{where}: a prompt of {prompt_length} tokens is read, then {new_tokens} tokens are generated; medians of "
        f"{_ROUNDS}. Each runs in a process of its own; its peak of memory is counted from before the model is there."
    )


def report_trained(setting: Setting, options: argparse.Namespace) -> None:
    """The trained models: which dense one is as good, and what either costs."""
    seed = setting.seeds[0]
    names = ("molm-mi", "dense-active", "dense-total")
    bits = {}
    for name in names:
        found = setting.first_training(name, seed)["bits_per_byte"]
        bits[name] = sum(found.values()) / len(found)
    measured = {name: _in_own_process(options, name) for name in names}
    dense = [name for name in names if name != "molm-mi"]
    as_good = [name for name in dense if bits[name] <= bits["molm-mi"]]
    equal = min(as_good or dense, key=lambda name: abs(bits[name] - bits["molm-mi"]))
    rows = [_row(name, measured[name], f"{bits[name]:.3f}") for name in names]
    head = ["model", "parameters [M]", "bits per byte", *_COLUMNS]
    about = f"Models of experiment 1 (seed {seed}), float32, {_conditions(options)}"
    molm, other = measured["molm-mi"], measured[equal]
    quality = "as good" if as_good else "nearest, though not as good,"
    faster = other["read_seconds"] / molm["read_seconds"]
    generation = other["token_seconds"] / molm["token_seconds"]
    shown = verdict(
        "MoLM is faster than a dense model of equal quality.",
        faster > 1 and generation > 1,
        f"the dense model that is {quality} is {equal} ({bits[equal]:.3f} against {bits['molm-mi']:.3f} bits per "
        f"byte); MoLM reads {faster:.2f}x and generates {generation:.2f}x as fast, with "
        f"{molm['weight_bytes'] / other['weight_bytes']:.2f}x the weights.",
    )
    write_report(
        setting.results,
        "Efficiency of the trained models",
        [about, markdown_table(head, rows), "![Speed against quality](efficiency.png)", shown],
        {"size": vars(setting.size), "seed": seed, "bits_per_byte": bits, "measured": measured},
    )
    figure, axes = new_figure(2, width=5)
    for axis, (key, title) in zip(
        axes, {"read_seconds": "reading a prompt [ms]", "token_seconds": "a generated token [ms]"}.items(), strict=True
    ):
        for name in names:
            colour = COLOURS[0 if name == "molm-mi" else 1]
            axis.plot(1e3 * measured[name][key], bits[name], "o", color=colour)
            axis.annotate(name, (1e3 * measured[name][key], bits[name]), (4, 4), textcoords="offset points")
        axis.margins(x=0.25)
        axis.set_xlabel(title)
        axis.set_ylabel("held-out bits per byte")
        axis.grid(alpha=0.3)
    save_figure(figure, setting.results / "efficiency.png")


def report_paper(setting: Setting, options: argparse.Namespace) -> None:
    """The paper's pair of models at full size."""
    measured = {contestant: _in_own_process(options, contestant) for contestant in ("molm", "dense")}
    config, dense_config = MoLMConfig.preset(options.preset), PAPER_PAIRS[options.preset]
    titles = {"molm": options.preset, "dense": f"dense, {dense_config.n_layer} layers of {dense_config.n_embd}"}
    active = {"molm": active_parameters(config), "dense": dense_config.num_parameters}
    rows = [_row(titles[name], measured[name], f"{active[name] / 1e6:.0f}") for name in measured]
    molm, dense = measured["molm"], measured["dense"]
    about = (
        f"{options.preset} and a dense model of the shape of the one it is near to in quality, random weights, "
        f"bfloat16, {_conditions(options)} The dense model runs on PyTorch's own operators."
    )
    read = dense["read_seconds"] / molm["read_seconds"]
    generation = dense["token_seconds"] / molm["token_seconds"]
    shown = verdict(
        "MoLM has twice the throughput of a dense model that is near in quality.",
        read >= 2 and generation >= 2,
        f"it reads {read:.2f}x and generates {generation:.2f}x as fast; its weights are "
        f"{molm['weight_bytes'] / dense['weight_bytes']:.2f}x as large.",
    )
    write_report(
        setting.results,
        f"Efficiency at the paper's size: {options.preset}",
        [about, markdown_table(["model", "parameters [M]", "active [M]", *_COLUMNS], rows), shown],
        {"measured": measured, "dense": dataclasses.asdict(dense_config), "device": options.device},
    )


if __name__ == "__main__":
    main()
