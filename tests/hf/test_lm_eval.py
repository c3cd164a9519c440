"""lm-evaluation-harness on a MoLM directory, with tasks on local text, gives what our own evaluation gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moduleformer_ext.cli import main
from moduleformer_ext.data import TokenStream, load_tokenizer, train_tokenizer
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.train.evaluation import evaluate

DOCUMENTS = [
    "the cat sat on the mat and saw the dog",
    "a dog ran to the cat",
    "the mat lay on a mat of the cat and the dog",
]
TASKS = {
    "local_choice": """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["cat", "dog sat", "mat"]
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "local_words": """
task: local_words
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "local_writing": """
task: local_writing
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: " cat"
generation_kwargs: {until: ["qqq"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for transformers, one of ours, and the tasks."""
    root = tmp_path_factory.mktemp("lm_eval")
    tokenizer = train_tokenizer(DOCUMENTS * 20, 280)
    torch.manual_seed(0)
    model = MoLMForCausalLM(
        MoLMConfig.preset("molm-nano", vocab_size=tokenizer.get_vocab_size(), initializer_range=0.3)
    )
    model.save_pretrained(root / "native")
    tokenizer.save(str(root / "native" / "tokenizer.json"))
    assert main(["convert", str(root / "native"), str(root / "hf"), "--to", "hf"]) == 0
    (root / "data.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in DOCUMENTS))
    (root / "tasks").mkdir()
    data = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{root / "data.jsonl"}"}}}}
test_split: test
"""
    for name, task in TASKS.items():
        (root / "tasks" / f"{name}.yaml").write_text(task + data)
    return root


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        return simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder / 'hf'},dtype=float32,trust_remote_code=True",
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
            batch_size=2,
            device="cpu",
            bootstrap_iters=0,
            log_samples=True,
        )


@pytest.fixture(scope="module")
def native(folder: Path) -> tuple[MoLMForCausalLM, Any]:
    return MoLMForCausalLM.from_pretrained(folder / "native"), load_tokenizer(folder / "native" / "tokenizer.json")


def log_likelihood(model: MoLMForCausalLM, before: list[int], after: list[int]) -> float:
    x = torch.tensor([before + after])
    logits = model(x).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(after)[:, None]).sum().item()


def test_choices(results: Any, native: tuple[MoLMForCausalLM, Any]) -> None:
    model, tokenizer = native
    right = 0
    for text, sample in zip(DOCUMENTS, results["samples"]["local_choice"], strict=True):
        before = tokenizer.encode(text).ids
        found = [float(answer[0][0]) for answer in sample["resps"]]
        after = [tokenizer.encode(text + choice).ids[len(before) :] for choice in (" cat", " dog sat", " mat")]
        expected = [log_likelihood(model, before, ids) for ids in after]
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)
        right += expected[0] == max(expected)
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(right / 3)


def test_whole_texts_against_eval(results: Any, native: tuple[MoLMForCausalLM, Any]) -> None:
    """Bits per byte are those of our `evaluate`, of each text with the end of text before it."""
    model, tokenizer = native
    bits = num_bytes = 0.0
    for text, sample in zip(DOCUMENTS, results["samples"]["local_words"], strict=True):
        ids = np.array([0, *tokenizer.encode(text).ids], dtype=np.uint16)
        score = evaluate(model, {"text": TokenStream(ids, len(text.encode()), 1)})["text"]
        found = sample["resps"][0][0]
        assert float(found) == pytest.approx(-score.bits * math.log(2), rel=1e-6)
        bits, num_bytes = bits + score.bits, num_bytes + score.num_bytes
    assert results["results"]["local_words"]["bits_per_byte,none"] == pytest.approx(bits / num_bytes, rel=1e-6)


def test_writing(results: Any, native: tuple[MoLMForCausalLM, Any]) -> None:
    model, tokenizer = native
    for text, sample in zip(DOCUMENTS, results["samples"]["local_writing"], strict=True):
        ids = torch.tensor([tokenizer.encode(text).ids])
        written = model.generate(ids, 8, eos_token_id=0)[0, ids.shape[1] :].tolist()
        assert sample["resps"][0][0] == tokenizer.decode(written)


def test_a_loaded_model_is_taken_as_well(folder: Path, native: tuple[MoLMForCausalLM, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder / "hf"), batch_size=2)
    assert harness.max_length == 2048
