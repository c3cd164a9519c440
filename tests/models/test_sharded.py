"""A model sharded over processes by FSDP2 trains, generates and is saved as one that is whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from small_models import random_model

from moduleformer_ext.models import MoLMForCausalLM

WORLD = 2
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])

RANK = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from small_models import random_model
from test_sharded import IDS, WORLD

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
model = random_model(torch.float32)
for block in model.transformer.h:
    fully_shard(block)
fully_shard(model)
tokens = model.generate(IDS, 5)
model.train()
model(IDS, labels=IDS).loss.backward()
grad = model.transformer.h[0].mlpf.experts.weight.grad.full_tensor()
model.save_pretrained(f"{folder}/model")
if rank == 0:
    torch.save((tokens, grad), f"{folder}/found.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_by_fsdp(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    processes = [
        subprocess.Popen([*command, str(rank), tmp_path], cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, errors
    tokens, grad = torch.load(tmp_path / "found.pt")

    model = random_model(torch.float32)
    assert torch.equal(tokens, model.generate(IDS, 5))
    model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(grad, model.transformer.h[0].mlpf.experts.weight.grad)
    saved = MoLMForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
