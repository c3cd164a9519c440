"""Models on disk, ours and published ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import BASE, random_model, random_state

from moduleformer_ext.models import MoLM, MoLMConfig, MoLMForCausalLM, checkpoint

IDS = torch.arange(6)[None]


def nano(**changes: Any) -> MoLMForCausalLM:
    return MoLMForCausalLM(MoLMConfig.preset("molm-nano", **changes))


def same(a: MoLMForCausalLM, b: MoLMForCausalLM) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def publish(directory: Path, layout: str, config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Write a directory as it is downloaded."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    suffix, write = (".safetensors", save_file) if "safetensors" in layout else (".bin", torch.save)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    if "sharded" not in layout:
        write(state, directory / f"{stem}{suffix}")
        return
    names = sorted(state)
    shards = {f"{stem}-0000{i + 1}-of-00003{suffix}": names[i::3] for i in range(3)}
    for shard, members in shards.items():
        write({name: state[name] for name in members}, directory / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    config = MoLMConfig.preset("molm-nano", tie_word_embeddings=tied, n_mlp_experts=[4, 6])
    model = MoLMForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path / "deep" / "er")
    loaded = MoLMForCausalLM.from_pretrained(tmp_path / "deep" / "er")
    assert loaded.config == config and not loaded.training and same(model, loaded)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == ["config.json", "model.safetensors"]
    half = MoLMForCausalLM.from_pretrained(tmp_path / "deep" / "er", dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_published_directories(tmp_path: Path, layout: str) -> None:
    state = random_state(BASE)
    for layer in range(2):  # buffers of old checkpoints
        state[f"transformer.h.{layer}.attn.mask"] = torch.ones(4, 4, dtype=torch.int8)
        state[f"transformer.h.{layer}.attn.cum_weight"] = torch.ones(4, 4)
    publish(tmp_path, layout, BASE, state)
    model = MoLMForCausalLM.from_pretrained(tmp_path)
    assert same(model, random_model())
    torch.testing.assert_close(model(IDS).uncast_logits, random_model()(IDS).uncast_logits)


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = nano(), nano(n_layer=1)
    old.save_pretrained(tmp_path)

    def write_half(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", write_half)
        with pytest.raises(OSError, match="disk full"):
            new.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert same(old, MoLMForCausalLM.from_pretrained(tmp_path))


def test_killed_between_the_two_files_the_new_model_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = nano(), nano(n_layer=1)
    old.save_pretrained(tmp_path)
    replace = os.replace

    def die_at_config(source: Path, target: Path) -> None:
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_at_config)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
    loaded = MoLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.n_layer == 1 and same(new, loaded)


def test_conversion_round_trip() -> None:
    config, state = random_model().to_reference()
    original = random_state(BASE)
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], original[name]) for name in state)
    again = MoLMForCausalLM.from_reference(config, state)
    assert torch.equal(again(IDS).uncast_logits, random_model()(IDS).uncast_logits)


def test_the_callers_tensors_are_not_shared() -> None:
    state = random_state(BASE)
    model = MoLMForCausalLM.from_reference(BASE, state)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (state["lm_head.weight"] != 0).any()


def test_misfitting_weights_are_listed() -> None:
    state = random_state(BASE)
    del state["lm_head.weight"], state["transformer.h.1.attn.k_proj.bias"]
    state["lm_head.bias"] = torch.ones(31)
    state["transformer.wte.weight"] = torch.ones(30, 16)
    state["transformer.ln_f.bias"] = torch.ones(16, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit") as error:
        MoLMForCausalLM.from_reference(BASE, state)
    for words in (
        "2 missing: transformer.h.1.attn.k_proj.bias, lm_head.weight",
        "1 unknown: lm_head.bias",
        "1 of the wrong shape: transformer.wte.weight (expected [31, 16], got [30, 16])",
        "1 not floating point: transformer.ln_f.bias (torch.int64)",
    ):
        assert words in str(error.value)


def test_a_classifiers_backbone_loads_without_its_head() -> None:
    state = random_state(BASE)
    expected = MoLMForCausalLM.from_reference(BASE, state).transformer(IDS).last_hidden_state
    del state["lm_head.weight"]
    state["score.weight"] = torch.ones(2, 16)
    assert torch.equal(MoLM.from_reference(BASE, state)(IDS).last_hidden_state, expected)
    with pytest.raises(ValueError, match=r"sequence classifier.*MoLM\.from_reference"):
        MoLMForCausalLM.from_reference(BASE, state)
    del state["transformer.ln_f.bias"]
    with pytest.raises(ValueError, match=r"1 missing: ln_f\.bias"):
        MoLM.from_reference(BASE, state)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        MoLMForCausalLM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        MoLMForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors, pytorch_model\.bin"):
        MoLMForCausalLM.from_pretrained(tmp_path)
    publish(tmp_path, "sharded safetensors", BASE, random_state(BASE))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00003\.safetensors, which is not in"):
        MoLMForCausalLM.from_pretrained(tmp_path)


def test_an_index_cannot_point_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(ValueError, match="must name files beside it"):
        MoLMForCausalLM.from_pretrained(tmp_path)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


def test_bin_files_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    torch.save({"lm_head.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        MoLMForCausalLM.from_pretrained(tmp_path)
    assert "this must not run" not in capsys.readouterr().out


SAVE_FOREVER = """
import sys, torch
from moduleformer_ext.models import MoLM, MoLMConfig, MoLMForCausalLM

torch.set_num_threads(1)
models = [MoLMForCausalLM(MoLMConfig.preset("molm-nano", n_layer=n)) for n in (1, 2)]
for model, value in zip(models, (1.0, 2.0)):
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
while True:
    for model in models:
        model.save_pretrained(sys.argv[1])
        print(flush=True)
"""


@pytest.mark.slow
def test_kill_never_leaves_a_mixture(tmp_path: Path) -> None:
    for attempt in range(8):
        with subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, tmp_path], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(1 + attempt % 3):
                writer.stdout.readline()
            time.sleep(0.003 * attempt)
            writer.kill()
        model = MoLMForCausalLM.from_pretrained(tmp_path)
        assert all((p == model.config.n_layer).all() for p in model.parameters())


def test_too_many_layers_are_refused_before_they_are_built(tmp_path: Path) -> None:
    publish(tmp_path, "safetensors", {**BASE, "n_layer": 1_000_000}, random_state(BASE))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"n_layer must be 2, the number of layers with tensors, got 1000000"):
        MoLMForCausalLM.from_pretrained(tmp_path)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "is not valid JSON"),
        ("config.json", b"[1]", "must be an object, got"),
        ("config.json", b"\xff", "is not UTF-8 text"),
        ("model.safetensors", b"half", "is not a whole safetensors file"),
        ("model.safetensors", None, "is not a whole safetensors file"),
        ("pytorch_model.bin", b"half", "cannot be read"),
        ("model.safetensors.index.json", b"{}", "weight_map must be given"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    publish(tmp_path, "safetensors", BASE, random_state(BASE))
    whole = (tmp_path / "model.safetensors").read_bytes()
    if name not in ("config.json", "model.safetensors"):
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(whole[:-100] if content is None else content)
    with pytest.raises(ValueError, match=rf"{name}'.* {message}|{name}': {message}") as raised:
        MoLMForCausalLM.from_pretrained(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    publish(tmp_path, "safetensors", BASE, random_state(BASE))
    (tmp_path / "config.json").write_text(json.dumps(BASE), encoding="utf-8-sig")
    assert same(MoLMForCausalLM.from_pretrained(tmp_path), random_model())


def test_the_same_model_is_the_same_bytes(tmp_path: Path) -> None:
    model = nano()
    contents = set()
    for number in range(12):
        model.save_pretrained(tmp_path / str(number))
        contents.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(contents) == 1
    assert same(model, MoLMForCausalLM.from_pretrained(tmp_path / "0"))


@pytest.mark.skipif(os.name != "posix", reason="about file modes")
def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        nano().save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {"config.json": 0o640, "model.safetensors": 0o640}
