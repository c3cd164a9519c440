"""What goes in and out of a model goes through DDP, torch.export and torch.compile."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_models import IDENTITY_KV, random_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from moduleformer_ext.models import KVCache, StaticKVCache

IDS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
CHANGES = pytest.mark.parametrize("changes", [{}, IDENTITY_KV], ids=["linear", "identity"])


@CHANGES
def test_outputs_and_caches_come_back_from_their_leaves(changes: dict[str, int]) -> None:
    model = random_model(**changes)
    output = model(IDS, labels=IDS, use_cache=True, output_hidden_states=True, output_routes=True)
    static = output.past_key_values.to_static(12)
    for record in (output, output.past_key_values, static, KVCache.empty(2, 8), model.transformer(IDS)):
        leaves, spec = pytree.tree_flatten(record)
        assert all(isinstance(leaf, (torch.Tensor, int)) for leaf in leaves)
        again = pytree.tree_unflatten(leaves, spec)
        assert type(again) is type(record)
        assert all(a is b for a, b in zip(pytree.tree_leaves(again), leaves, strict=True))
        assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    leaves = pytree.tree_leaves(output)
    tensors = [output.logits, output.loss, output.aux_loss, output.routes[1].ffn.gates, output.past_key_values[0][0]]
    assert all(
        any(tensor.data_ptr() == leaf.data_ptr() for leaf in leaves if torch.is_tensor(leaf)) for tensor in tensors
    )


@pytest.fixture
def one_process(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused_parameters": True}, {}])
def test_ddp_gives_the_gradients(options: dict[str, bool]) -> None:
    model = random_model(torch.float32)
    model(IDS, labels=IDS).loss.backward()
    distributed = DistributedDataParallel(copy.deepcopy(model), **options)
    reduced = 0

    def count(_state, bucket):  # type: ignore[no-untyped-def]  # DDP wants real annotations or none
        nonlocal reduced
        reduced += 1
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(2 * bucket.buffer())
        return future

    distributed.register_comm_hook(None, count)
    for step in range(3):
        distributed.zero_grad()
        distributed(IDS, labels=IDS, use_cache=True).loss.backward()
        assert reduced > step
        for own, theirs in zip(model.parameters(), distributed.module.parameters(), strict=True):
            torch.testing.assert_close(theirs.grad, 2 * own.grad, msg=f"step {step}")


@CHANGES
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_the_model(changes: dict[str, int], strict: bool, tmp_path: Path) -> None:
    model = random_model(torch.float32, **changes)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    options = {"use_cache": True, "output_routes": True}
    program = torch.export.export(
        model, (IDS,), options, dynamic_shapes={"input_ids": {1: tokens}, **dict.fromkeys(options)}, strict=strict
    )
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for length in (9, 5, 40):
        ids = torch.randint(31, (2, length))
        output, expected = exported(ids, **options), model(ids, **options)
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.routes[0].ffn.counts, expected.routes[0].ffn.counts)
        torch.testing.assert_close(output.past_key_values[1][0], expected.past_key_values[1][0])


class Step(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, past: KVCache | StaticKVCache) -> tuple[torch.Tensor, KVCache | StaticKVCache]:
        output = self.model(ids, past_key_values=past, use_cache=True)
        return output.logits, output.past_key_values


@CHANGES
@torch.no_grad()
def test_export_of_a_decoding_step(changes: dict[str, int]) -> None:
    model = random_model(torch.float32, **changes)
    whole = model(IDS).logits
    past = model(IDS[:, :5], use_cache=True).past_key_values
    length = torch.export.Dim("length", min=2, max=64)
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves(past):
        shapes[leaf] = {1: length}
    program = torch.export.export(Step(model), (IDS[:, 5:6], past), dynamic_shapes=shapes)
    step = program.module()
    for t in range(5, 9):
        logits, past = step(IDS[:, t : t + 1], past)
        torch.testing.assert_close(logits, whole[:, t : t + 1])
    assert past.length == 9


@CHANGES
@torch.no_grad()
def test_export_of_a_static_decoding_step(changes: dict[str, int]) -> None:
    model = random_model(torch.float32, **changes)
    whole = model(IDS).logits
    past = model(IDS[:, :5], use_cache=True).past_key_values.to_static(16)
    step = torch.export.export(Step(model), (IDS[:, 5:6], past)).module()
    for t in range(5, 9):
        logits, past = step(IDS[:, t : t + 1], past)
        torch.testing.assert_close(logits, whole[:, t : t + 1])
    assert past.lengths.tolist() == [9, 9]


@CHANGES
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_decoding_compiles_once(changes: dict[str, int], backend: str) -> None:
    model = random_model(torch.float32, **changes)
    ids = torch.randint(31, (2, 30))
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[0, :2] = False
    whole = model(ids, attention_mask=mask[:, :30]).logits
    past = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values.to_static(32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    for t in range(5, 30):
        output = step(ids[:, t : t + 1], mask, past_key_values=past, use_cache=True)
        past = output.past_key_values
        torch.testing.assert_close(output.logits, whole[:, t : t + 1])
    assert counter.frame_count == 1 and past.lengths.tolist() == [30, 30]


@CHANGES
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_decoding_with_a_growing_cache(changes: dict[str, int], backend: str) -> None:
    model = random_model(torch.float32, **changes)
    ids = torch.randint(31, (2, 12))
    whole = model(ids).logits
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    past = model(ids[:, :5], use_cache=True).past_key_values
    for t in range(5, 12):
        output = step(ids[:, t : t + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        torch.testing.assert_close(output.logits, whole[:, t : t + 1])
    assert counter.frame_count <= 3
