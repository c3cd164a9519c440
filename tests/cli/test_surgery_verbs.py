"""usage, prune, extend, finetune, compare and merge on a small run."""

import json
from pathlib import Path

import pytest
import torch

from moduleformer_ext.cli import main
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import Site, compare, count_parameters

MODEL = ["n_embd=16", "n_layer=2", "att_hidden=16", "ffd_hidden=16", "gating_size=8"]
SHAPE = ["--batch-size", "2", "--segment-length", "12"]
STEPS = ["--steps", "3", "--dtype", "fp32", "--checkpoint-every", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("texts")
    for domain, factor in (("near", 3), ("far", 5)):
        (root / domain).mkdir()
        for number in range(8):
            words = " ".join(f"{domain}{number * index % factor}" for index in range(60))
            (root / domain / f"{number}.txt").write_text(f"{words}\n")
    return [f"{domain}={root / domain}" for domain in ("near", "far")]


@pytest.fixture(scope="module")
def run(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--preset", "molm-nano", "--vocab-size", "270", "--held-out", "0.3", "--history-length", "20", *STEPS]
    words = ["train", "--run", str(root), "--text", *texts, "--segment-length", "12", *flags, "--model", *MODEL]
    assert main(words) == 0
    return root


@pytest.fixture(scope="module")
def extended(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("extended") / "model"
    assert main(["extend", str(run), str(output), "--attention", "1", "--ffn", "2", "0", "--seed", "4"]) == 0
    return output


def _model(path: Path) -> MoLMForCausalLM:
    return MoLMForCausalLM.from_pretrained(path)


def _last(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def test_usage_then_prune(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", str(run), str(tmp_path / "usage"), *SHAPE]) == 0
    assert sorted(path.name for path in (tmp_path / "usage").iterdir()) == ["usage.csv", "usage.json", "usage.png"]
    record = json.loads((tmp_path / "usage" / "usage.json").read_text())
    assert set(record["domains"]) == {"near", "far"}
    assert len(record["divergence"]["ffn"]["near"]["far"]) == 2
    capsys.readouterr()

    words = ["prune", str(run), str(tmp_path / "small"), "--remaining", "0.8", "--domain", "near"]
    dry_runs = []
    for source in (["--usage", str(tmp_path / "usage")], SHAPE):
        assert main([*words, *source, "--dry-run"]) == 0
        dry_runs.append(capsys.readouterr().out)
    assert dry_runs[0] == dry_runs[1]
    assert not (tmp_path / "small").exists()
    assert main([*words, *SHAPE]) == 0
    assert capsys.readouterr().out.startswith(dry_runs[0])
    before, after = _model(_last(run)), _model(tmp_path / "small")
    assert sum(p.numel() for p in after.parameters()) == count_parameters(after.config)
    assert count_parameters(after.config) <= 0.8 * count_parameters(before.config)
    assert main(["generate", str(tmp_path / "small"), "--prompt", "near", "--max-new-tokens", "5"]) == 0


def test_prune_then_finetune(run: Path, texts: list[str], tmp_path: Path) -> None:
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    assert main(["prune", str(run), str(small), "--remaining", "0.8", *SHAPE]) == 0
    words = ["finetune", str(small), "--run", str(tuned), "--text", *texts, "--segment-length", "12", *STEPS]
    assert main(words) == 0
    before, after = _model(small), _model(_last(tuned))
    assert after.config.ffn.places == before.config.ffn.places
    assert count_parameters(after.config) == count_parameters(before.config)
    found = compare(before, after)
    assert all(change for site in found.experts.values() for change in site.rows.values())


def test_extend_finetune_compare(run: Path, extended: Path, texts: list[str], tmp_path: Path, capsys) -> None:
    tuned = tmp_path / "tuned"
    words = ["finetune", str(extended), "--run", str(tuned), "--text", *texts, "--segment-length", "12", *STEPS]
    words += ["--trainable", "new", "--train-embedding", "--routing-penalty", "0.1"]
    assert main(words) == 0
    assert (tuned / "base" / "tokenizer.json").read_bytes() == (run / "data" / "tokenizer.json").read_bytes()
    found = compare(_model(extended), _model(_last(tuned)))
    for site, comparison in found.experts.items():
        num_old = 4 if site.kind == "attention" else 8
        for changes in (comparison.matrices, comparison.rows):
            assert not any(change for identity, change in changes.items() if identity < num_old)
            assert all(change for identity, change in changes.items() if identity >= num_old)
    assert [name for name, change in found.others.items() if change] == ["transformer.wte.weight"]

    capsys.readouterr()
    assert main(["compare", str(run), str(tuned), "--json"]) == 0
    by_site = json.loads(capsys.readouterr().out)["experts"]
    assert [row["only_second"] for row in by_site] == [[4], [8, 9], [4], []]
    assert main(["compare", str(run), str(tuned)]) == 0
    assert ["layer", "0", "ffn", "8", "8,", "9"] in [line.split() for line in capsys.readouterr().out.splitlines()]

    # what is resumed is what was fine-tuned, with frozen parts frozen
    result = (tuned / "evaluation.json").read_text()
    assert main(["train", "--resume", str(tuned)]) == 0
    assert (tuned / "evaluation.json").read_text() == result


def test_merge(run: Path, extended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, both = tmp_path / "other", tmp_path / "both"
    assert main(["extend", str(run), str(other), "--ffn", "1", "--seed", "5"]) == 0
    assert main(["merge", str(extended), str(other), str(both)]) == 0
    assert f"wrote {both}: " in capsys.readouterr().out
    assert (both / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    merged, parts = _model(both), [_model(extended), _model(other)]
    assert merged.config.num_experts("attention") == (5, 5)
    assert [n - 8 for n in merged.config.num_experts("ffn")] == [3, 1]
    sizes = [count_parameters(model.config) for model in (*parts, _model(_last(run)), merged)]
    assert sizes[3] == sizes[0] + sizes[1] - sizes[2]
    assert main(["generate", str(both), "--prompt", "near", "--max-new-tokens", "5"]) == 0

    # a merge that cannot be leaves nothing behind, and neither does one that is cut off
    (other / "tokenizer.json").write_text("{}")
    assert main(["merge", str(extended), str(other), str(tmp_path / "no")]) == 2
    assert "models must have the same tokenizer" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "other"]


@pytest.mark.parametrize("verb", ["usage", "prune", "extend", "merge", "convert", "quantise"])
def test_an_interrupted_verb_leaves_nothing(
    verb: str, run: Path, extended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    words = {
        "usage": [str(run), str(output), *SHAPE],
        "prune": [str(run), str(output), "--remaining", "0.8", *SHAPE],
        "extend": [str(run), str(output), "--ffn", "1"],
        "merge": [str(run), str(extended), str(output)],
        "convert": [str(run), str(output)],
        "quantise": [str(run), str(output)],
    }[verb]

    def stop(*_: object, **__: object) -> None:
        if verb != "usage":
            save(*_, **__)  # the weights are there, the folder has not got its name yet
        raise KeyboardInterrupt

    save = MoLMForCausalLM.save_pretrained
    monkeypatch.setattr(MoLMForCausalLM, "save_pretrained", stop)
    monkeypatch.setattr("moduleformer_ext.cli.usage.plot_expert_usage", stop)
    assert main([verb, *words]) == 130
    assert not any(tmp_path.iterdir())


def test_concentrate_then_prune(run: Path, tmp_path: Path) -> None:
    tuned, small = tmp_path / "tuned", tmp_path / "small"
    assert main(["finetune", str(run), "--run", str(tuned), "--concentrate", "0.5", *STEPS]) == 0
    config = _model(_last(tuned)).config
    assert (config.aux_loss_type, config.aux_loss_weight) == ("concentration", 0.5)
    stored, base = (json.loads((root / "run.json").read_text()) for root in (tuned, run))
    assert [stored[name] for name in ("text", "segment_length")] == [base[name] for name in ("text", "segment_length")]
    assert main(["prune", str(tuned), str(small), "--threshold", "0.5", "--keep-normaliser", *SHAPE]) == 0
    assert main(["extend", str(small), str(tmp_path / "again"), "--ffn", "1", "--init", "copy"]) == 0
    identities = Site("ffn", 0).identities(_model(tmp_path / "again").config)
    assert identities[-1] == 8


@pytest.mark.parametrize(
    "words",
    [
        "convert {source} {source}/new",
        "convert {run}/checkpoints/{last} {run}/checkpoints/new",
        "prune {source} {source}/new --remaining 0.8",
        "quantise {source} {source}/new",
        "extend {source} {source}/deep/new --ffn 1",
        "merge {source} {extended} {source}/new",
        "merge {extended} {source} {source}/new",
        "usage {source} {source}/new",
        "finetune {source} --run {source}/new --steps 1",
        "train --run {run}/new --steps 1",
        "convert {extended} {run}/new",
    ],
)
@pytest.mark.parametrize("kind", ["run", "model", "link"])
def test_nothing_is_written_into_what_is_read(
    words: str, kind: str, run: Path, extended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = extended if kind == "model" else run
    if kind == "link":
        source = tmp_path / "link"
        source.symlink_to(run)
    before = sorted(path for folder in (run, extended) for path in folder.rglob("*"))
    names = {"source": source, "run": run, "extended": extended, "last": _last(run).name}
    assert main(words.format(**names).split()) == 2
    assert "new' must lie outside of '" in capsys.readouterr().err
    assert sorted(path for folder in (run, extended) for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "{run}", "{tmp}/o", "--threshold", "2"], "--threshold must be at most 1, got 2"),
        (["prune", "{run}", "{tmp}/o", "--remaining", "0.01"], "as every layer keeps k experts, got 0.01"),
        (["prune", "{run}", "{run}", "--remaining", "0.8"], "exists; name a folder to create"),
        (
            ["prune", "{run}", "{tmp}/o", "--remaining", "0.9", "--domain", "moon"],
            "must be among far, near, got moon",
        ),
        (["prune", "{run}", "{tmp}/o", "--remaining", "0.9", "--usage", "{tmp}"], "usage.json' does not exist"),
        (["prune", "{extended}", "{tmp}/o", "--remaining", "0.9"], "has no held-out text of its own"),
        (["extend", "{run}", "{tmp}/o"], "attention or ffn must be above 0"),
        (["extend", "{run}", "{tmp}/o", "--ffn", "1", "2", "3"], "one number or one per layer (2)"),
        (["usage", "{run}", "{run}"], "exists; name a folder to create"),
        (["merge", "{run}", "{extended}", "{run}"], "exists; name a folder to create"),
        (["merge", "{run}", "{tmp}", "{tmp}/o"], "is neither a run nor a model directory"),
        (["compare", "{run}", "{tmp}"], "is neither a run nor a model directory"),
        (["finetune", "{run}", "--run", "{tmp}/o", "--steps", "1", "--trainable", "new"], "without new experts"),
        (["finetune", "{run}", "--run", "{tmp}/o", "--steps", "1", "--routing-penalty", "1"], "without new experts"),
        (["finetune", "{run}", "--run", "{tmp}/o", "--steps", "1", "--model", "n_embd=8"], "fixes n_embd"),
        (
            ["finetune", "{run}", "--run", "{tmp}/o", "--steps", "1", "--trainable", "some"],
            "must be 'all', 'experts' or 'new'",
        ),
        (
            ["finetune", "{run}", "--run", "{tmp}/o", "--steps", "1", "--concentrate", "1", "--aux-loss-weight", "1"],
            "leave --aux-loss-weight out",
        ),
    ],
)
def test_complaints_come_before_anything_is_written(
    run: Path, extended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    shape = SHAPE if words[0] in ("prune", "usage") else []
    assert main([*(word.format(tmp=tmp_path, run=run, extended=extended) for word in words), *shape]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"moduleformer-ext {words[0]}: ")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [8, 4])
def test_quantise(bits: int, run: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "few bits"
    assert main(["quantise", str(run), str(out), "--bits", str(bits)]) == 0
    assert f"(experts of {bits} bits, " in capsys.readouterr().out
    assert _model(out).config.expert_bits == bits
    scores = []
    for model in (run, out):
        assert main(["eval", str(model), "--json", "--dtype", "fp32", "--text", texts[0]]) == 0
        scores.append(json.loads(capsys.readouterr().out)["bits_per_byte"])
    assert scores[1] == pytest.approx(scores[0], rel=0.02)
    assert main(["generate", str(out), "--prompt", "near1", "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    assert main(["finetune", str(out), "--run", str(tmp_path / "r"), "--text", *texts, *STEPS]) == 2
    assert f"expert_bits must be None, got {bits}" in capsys.readouterr().err
