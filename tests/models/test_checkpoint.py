"""Models on disk, ours and published ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import BASE, random_model, random_state
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

from moduleformer_ext.models import MoLM, MoLMConfig, MoLMForCausalLM, checkpoint
from moduleformer_ext.nn.segments import split_parameter

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
        "1 of the wrong type: transformer.ln_f.bias (expected floating point, got torch.int64)",
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


def logits(model: MoLMForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def compile_block(model: MoLMForCausalLM) -> None:
    model.transformer.h[1] = torch.compile(model.transformer.h[1], backend="eager")


def parametrise_experts(model: MoLMForCausalLM) -> None:
    for name, weight in (("mlpf.experts", "weight"), ("attn.q_proj.gate.w_gate.0", "bias")):
        parametrize.register_parametrization(model.transformer.h[0].get_submodule(name), weight, torch.nn.Tanh())


def wrap_for_checkpointing(model: MoLMForCausalLM) -> None:
    model.transformer.h[0] = checkpoint_wrapper(model.transformer.h[0])


def tie_by_hand(model: MoLMForCausalLM) -> None:
    model.lm_head.weight = model.transformer.wte.weight


def split_experts(model: MoLMForCausalLM) -> None:
    split_parameter(model.transformer.h[0].mlpf.experts, "weight", 2)


@pytest.mark.parametrize(
    "change", [compile_block, parametrise_experts, wrap_for_checkpointing, tie_by_hand, split_experts]
)
def test_whatever_a_model_is_wrapped_in_it_is_saved_as_a_plain_one(
    tmp_path: Path, change: Callable[[MoLMForCausalLM], None]
) -> None:
    model = random_model(torch.float32)
    change(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = MoLMForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), expected)
    assert loaded.state_dict().keys() == random_model().state_dict().keys()
    assert model.to_reference()[1].keys() == loaded.state_dict().keys()


def resize_head(model: MoLMForCausalLM) -> None:
    model.lm_head = torch.nn.Linear(16, 40, bias=False)


def add_head_bias(model: MoLMForCausalLM) -> None:
    model.lm_head = torch.nn.Linear(16, 31)


def drop_layer(model: MoLMForCausalLM) -> None:
    del model.transformer.h[1].mlpf.experts.weight


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (resize_head, r"of the wrong shape: lm_head\.weight \(expected \[31, 16\], got \[40, 16\]\)"),
        (add_head_bias, r"1 unknown: lm_head\.bias"),
        (drop_layer, r"1 missing: transformer\.h\.1\.mlpf\.experts\.weight"),
    ],
)
def test_what_would_not_load_is_not_saved(
    tmp_path: Path, change: Callable[[MoLMForCausalLM], None], words: str
) -> None:
    model = random_model(torch.float32)
    change(model)
    with pytest.raises(ValueError, match=rf"save_pretrained: the weights do not fit .*{words}"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_head_that_is_tied_in_name_only_is_not_saved(tmp_path: Path) -> None:
    model = nano(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.ones(1024, 128))
    with pytest.raises(ValueError, match=r"lm_head\.weight must be transformer\.wte\.weight"):
        model.save_pretrained(tmp_path / "model")


def test_a_head_that_is_tied_in_name_only_is_not_loaded(tmp_path: Path) -> None:
    publish(tmp_path, "safetensors", {**BASE, "tie_word_embeddings": True}, random_state(BASE))
    with pytest.raises(ValueError, match=r"lm_head\.weight must be transformer\.wte\.weight"):
        MoLMForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("present", ["lm_head.weight", "transformer.wte.weight"])
def test_one_tensor_of_tied_embeddings_is_enough(tmp_path: Path, present: str) -> None:
    config, state = {**BASE, "tie_word_embeddings": True}, random_state(BASE)
    for name in {"lm_head.weight", "transformer.wte.weight"} - {present}:
        del state[name]
    publish(tmp_path, "safetensors", config, state)
    model = MoLMForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, state[present])


def test_bin_files_older_than_zip(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    torch.save(random_state(BASE), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(MoLMForCausalLM.from_pretrained(tmp_path), random_model())


def test_weights_of_several_types_are_named_or_converted(tmp_path: Path) -> None:
    state = random_state(BASE, torch.bfloat16)
    for name in state:
        if ".ln_" in name or ".gate." in name:
            state[name] = state[name].float()
    publish(tmp_path, "safetensors", BASE, state)
    with pytest.raises(
        ValueError, match=r"one type outside of the routers .*float32: transformer\.h\.0\.ln_1"
    ) as error:
        MoLMForCausalLM.from_pretrained(tmp_path)
    assert ".gate." not in str(error.value)
    model = MoLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    routers_in_float32 = {n: tensor if ".gate." in n else tensor.bfloat16() for n, tensor in state.items()}
    model = MoLMForCausalLM.from_reference(BASE, routers_in_float32)
    model(IDS, labels=IDS).loss.backward()
    assert {p.grad.dtype for n, p in model.named_parameters() if ".gate." in n} == {torch.float32}
    model.save_pretrained(tmp_path / "again")
    assert same(model, MoLMForCausalLM.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("name", ["n_embd", "n_mlp_experts", "resid_pdrop", "aux_loss_weight", "tie_word_embeddings"])
@pytest.mark.parametrize("value", [None, "2"])
def test_a_field_of_another_type_is_named(tmp_path: Path, name: str, value: object) -> None:
    publish(tmp_path, "safetensors", {**BASE, name: value}, random_state(BASE))
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
        MoLMForCausalLM.from_pretrained(tmp_path)


def test_token_ids_may_be_null(tmp_path: Path) -> None:
    publish(tmp_path, "safetensors", {**BASE, "eos_token_id": None, "bos_token_id": None}, random_state(BASE))
    assert MoLMForCausalLM.from_pretrained(tmp_path).config.eos_token_id is None


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
