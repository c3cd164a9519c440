"""Every experiment runs from text to report, in its quick form, and finds what it has already done."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.experiments import continual, distribution, efficiency, language_modelling, length, pruning
from benchmarks.experiments.baselines import (
    DenseConfig,
    DenseForCausalLM,
    active_parameters,
    causal_softmax,
    dense_of_size,
    make_rotary_molm,
    rotate,
)
from benchmarks.experiments.language_modelling import generate
from benchmarks.experiments.setting import FULL, QUICK
from benchmarks.experiments.texts import _messages_by_file
from benchmarks.experiments.training import window_losses
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import count_parameters

ROOT = Path(__file__).parent.parent.parent
OLD = ["--text", f"code={ROOT / 'python'}", f"prose={ROOT / 'docs'}"]
NEW = ["--new-text", f"cpp={ROOT / 'csrc' / 'core'}", f"tests={ROOT / 'tests' / 'ops'}"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


def run(experiment, out: Path, *arguments: str) -> dict:
    name = experiment.__name__.rsplit(".", 1)[1]
    experiment.main(["--quick", "--seeds", "0", "--out", str(out), "--threads", "1", *OLD, *arguments])
    (results,) = (out / "quick" / "results").glob(f"{name}*/results.json")
    assert (results.parent / "table.md").read_text().startswith("# ")
    return json.loads(results.read_text())


def test_language_modelling(out, capsys):
    first = run(language_modelling, out)
    assert all(0 < bits[0] < 16 for domains in first["bits_per_byte"].values() for bits in domains.values())
    assert "training" in capsys.readouterr().out
    assert run(language_modelling, out) == first  # nothing is trained or timed again
    assert "training molm" not in capsys.readouterr().out


def test_length(out):
    results = run(length, out)["results"]
    assert set(results["molm-mi"][0]["bits_per_token"]) == {"32", "64", "128"}


def test_distribution(out):
    divergence = run(distribution, out, *NEW)["divergence"]
    assert all(value[0] >= 0 for columns in divergence.values() for value in columns.values())
    assert len(list((out / "quick" / "results" / "distribution").glob("*.png"))) == 2


def test_continual(out, capsys):
    results = run(continual, out, *NEW)
    assert results["language"] == "cpp"
    trainable = results["trainable"]
    assert trainable["dense, LoRA of rank 8"] < trainable["dense, LoRA of rank 64"] < trainable["dense, everything"]
    assert trainable["MoLM, new experts"] < trainable["MoLM, everything"]
    before = results["bits_per_byte"]["molm-mi"]
    for name in trainable:
        found = results["bits_per_byte"][name]
        assert found["old"][0] > 0 and found["new"] != before["new"]
    capsys.readouterr()
    assert run(continual, out, *NEW) == results
    assert "measuring" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(continual, out, *NEW, "--language", "latin")
    assert "--language: must be one of cpp, tests, got latin" in capsys.readouterr().err


def test_pruning(out, capsys):
    results = run(pruning, out)
    assert results["domain"] == "code"
    for name, curve in results["bits_per_byte"].items():
        assert "1.000" in curve and len(curve) > 1, name
        assert all(0 < bits[0] < 16 for bits in curve.values())
    capsys.readouterr()
    assert run(pruning, out) == results
    assert "measuring" not in capsys.readouterr().out


def test_a_shorter_model_lacks_one_layer(out):
    torch.manual_seed(0)
    model = MoLMForCausalLM(QUICK.molm.replace(n_layer=3)).eval()
    shorter = pruning.without_layer(model, 1)
    assert shorter.config.n_layer == 2
    tokens = torch.randint(QUICK.vocab_size, (1, 8))
    x = model.transformer.wte(tokens)
    for layer in (0, 2):
        x = model.transformer.h[layer](x)[0]
    torch.testing.assert_close(shorter(tokens).logits, model.lm_head(model.transformer.ln_f(x)))


def test_efficiency(out):
    measured = run(efficiency, out)["measured"]
    assert all(found["read_seconds"] > 0 for found in measured.values())


def test_efficiency_at_the_papers_size(out):
    efficiency.main(["--quick", "--paper", "--seeds", "0", "--out", str(out), "--threads", "1", *OLD])
    assert (out / "quick" / "results" / "efficiency-molm-4b-k2" / "table.md").exists()


def test_a_missing_gpu_is_named(out, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        efficiency.main(["--quick", "--paper", "--device", "cuda", "--out", str(out)])
    assert "GPU" in capsys.readouterr().err


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_dense_models_have_the_sizes_they_are_named_for(size):
    molm = size.molm
    dense = dense_of_size(molm, count_parameters(molm))
    model = DenseForCausalLM(dense)
    assert sum(parameter.numel() for parameter in model.parameters()) == dense.num_parameters
    assert dense.num_parameters == pytest.approx(count_parameters(molm), rel=0.05)
    assert active_parameters(molm) < count_parameters(molm)


def test_rotary_attention_depends_on_distances_only():
    q, k = torch.randn(2, 1, 4, 2, 8, dtype=torch.float64).unbind()
    here, there = (torch.einsum("bthd,bshd->bhts", rotate(q, at), rotate(k, at)) for at in (0, 3))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


def test_softmax_attends_to_its_own_past():
    q, k, v = torch.randn(3, 1, 5, 2, 8).unbind()
    whole = causal_softmax(q, k, v)
    for new in (1, 2):
        torch.testing.assert_close(causal_softmax(q[:, -new:], k, v), whole[:, -new:])


@pytest.mark.parametrize("make", [DenseForCausalLM, make_rotary_molm])
def test_decoding_equals_reading(make):
    torch.manual_seed(0)
    config = DenseConfig(64, 32, 2, 2, 48) if make is DenseForCausalLM else QUICK.molm.replace(vocab_size=64)
    model = make(config).eval()
    tokens = generate(model, torch.randint(64, (1, 7)), 6)
    with torch.no_grad():
        greedy = model(tokens).logits.argmax(-1)
    assert torch.equal(greedy[:, 6:-1], tokens[:, 7:])


def test_every_token_is_scored_once_in_its_window():
    model = DenseForCausalLM(DenseConfig(64, 32, 1, 2, 48))
    tokens = torch.randint(64, (12,))
    losses = window_losses(model, tokens, 4)
    assert losses.shape == (11,)
    alone = torch.nn.functional.cross_entropy(model(tokens[None, 4:8]).logits[0], tokens[5:9], reduction="none")
    torch.testing.assert_close(losses[4:8], alone)


def test_catalogues_are_read_by_source_file(tmp_path):
    import zipfile

    catalogue = (
        'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
        '#: shop/views.py:3\nmsgid "A whole sentence of text."\nmsgstr "Ein ganzer Satz aus Text."\n\n'
        '#: shop/models.py:9\nmsgid "Label"\nmsgstr "Schild"\n\n'
        '#: shop/models.py:10\n#, fuzzy\nmsgid "Another whole sentence."\nmsgstr "Noch ein ganzer Satz, unsicher."\n'
    )
    wheel = tmp_path / "shop-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("shop/locale/de/LC_MESSAGES/django.po", catalogue)
        archive.writestr("shop/locale/vi/LC_MESSAGES/django.po", catalogue)
    assert _messages_by_file([wheel], "de") == {"shop/shop/views.py": "Ein ganzer Satz aus Text.\n"}
