"""`moduleformer-ext convert --to hf`, and what transformers makes of it without knowing this package."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import make_pair, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import moduleformer_ext
from moduleformer_ext.cli import main
from moduleformer_ext.data import train_tokenizer
from moduleformer_ext.data.tokenizer import END_OF_TEXT
from moduleformer_ext.hf import requirements
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

TEXT = "the cat sat on the mat and the dog sat on the cat "


def environment(folder: Path) -> dict[str, str]:
    """Of a program beside this one."""
    package = str(Path(moduleformer_ext.__file__).parents[1])
    return os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": package}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of ours with a tokenizer."""
    tokenizer = train_tokenizer([TEXT * 20], 270)
    torch.manual_seed(0)
    config = MoLMConfig.preset("molm-nano", vocab_size=tokenizer.get_vocab_size(), n_mlp_experts=[3, 5])
    MoLMForCausalLM(config).save_pretrained(tmp_path / "source")
    tokenizer.save(str(tmp_path / "source" / "tokenizer.json"))
    return tmp_path / "source"


def test_model_and_tokenizer(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target), "--to", "hf"]) == 0
    assert capsys.readouterr().out.endswith("(hf format)\n")
    native = MoLMForCausalLM.from_pretrained(source)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == end
    assert model.config.eos_token_id == model.generation_config.eos_token_id == end
    assert model.generation_config.pad_token_id == end
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "the cat\nsat\n"
    batch = tokenizer([TEXT, "the cat"], return_tensors="pt", padding=True)
    assert tokenizer.decode(batch["input_ids"][0]) == TEXT
    assert torch.equal(model(batch["input_ids"]).logits, native(batch["input_ids"]).uncast_logits)
    write = pipeline("text-generation", model=str(target), device="cpu")
    written = write("the cat", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    prompt = tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert written == tokenizer.decode(native.generate(prompt, 5, eos_token_id=end)[0], skip_special_tokens=True)


def test_without_importing_the_package(source: Path, tmp_path: Path) -> None:
    """As in a program that knows transformers alone: `trust_remote_code` finds the classes."""
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target), "--to", "hf"]) == 0
    program = f"""
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
assert "moduleformer_ext" not in sys.modules
options = {{"trust_remote_code": True}}
assert AutoConfig.from_pretrained({str(target)!r}, **options).n_mlp_experts == [3, 5]
model = AutoModelForCausalLM.from_pretrained({str(target)!r}, **options)
print(model(torch.arange(9)[None]).logits.sum().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    expected = MoLMForCausalLM.from_pretrained(source)(torch.arange(9)[None]).uncast_logits.sum().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-5)


def test_and_back(source: Path, tmp_path: Path) -> None:
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "native")]) == 0
    before, after = MoLMForCausalLM.from_pretrained(source), MoLMForCausalLM.from_pretrained(tmp_path / "native")
    assert after.config == before.config.replace(eos_token_id=after.config.eos_token_id)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    fields = json.loads((tmp_path / "native" / "config.json").read_text())
    assert fields["model_type"] == "moduleformer" and "auto_map" not in fields


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    native, _ = make_pair()
    native.save_pretrained(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "target"), "--to", "hf"]) == 0
    assert not (tmp_path / "target" / "tokenizer_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.equal(model(tokens(1, 5)).logits, native(tokens(1, 5)).uncast_logits)


def test_without_transformers_the_command_says_what_to_install(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("moduleformer_ext.hf")]:
        if name != "moduleformer_ext.hf.requirements":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(requirements.metadata, "version", lambda _: "4.57.1")
    assert main(["convert", str(source), str(tmp_path / "target"), "--to", "hf"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "needs transformers >= 5.17, found 4.57.1; install it with: pip install" in error
    assert not (tmp_path / "target").exists()


def test_the_server(source: Path, tmp_path: Path) -> None:
    """`python -m moduleformer_ext.hf serve DIRECTORY` answers completions and chats."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target), "--to", "hf"]) == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "moduleformer_ext.hf",
        "serve",
        str(target),
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(tmp_path))
    try:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
        for path, body, prompt in (
            ("completions", {"prompt": "the cat"}, "the cat"),
            ("chat/completions", {"messages": [{"role": "user", "content": "the cat"}]}, "the cat\n"),
        ):
            body |= {"model": str(target), "max_tokens": 6, "temperature": 0, "stream": False}
            answer = ask(f"http://localhost:{port}/v1/{path}", body)["choices"][0]
            ids = tokenizer(prompt, return_tensors="pt")
            written = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
            found = answer["text"] if "text" in answer else answer["message"]["content"]
            assert found == tokenizer.decode(written, skip_special_tokens=True)
    finally:
        server.kill()
        server.wait()


def ask(url: str, body: dict[str, Any], patience: float = 60.0) -> Any:
    """The answer, as soon as the server listens."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + patience
    while True:
        try:
            with urlopen(request, timeout=patience) as answer:
                return json.load(answer)
        except ConnectionError:
            pass
        except URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
        assert time.monotonic() < deadline, "the server does not listen"
        time.sleep(0.2)
