"""The benchmarks of the CUDA kernels, as far as they can be tried without a GPU: the same races on the CPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cells import OURS, Contestant, Race
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import device, peers
from benchmarks.gpu.cells import SECTIONS, usable
from benchmarks.gpu.meter import CudaMeter
from benchmarks.inputs import attention_inputs, expert_weights, normal, random_gates
from benchmarks.machine import CpuMeter, path_part
from benchmarks.results import Results
from moduleformer_ext import ops

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("section", SECTIONS)
def test_reports_every_cell(section: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "clocks", lambda: {"clocks.sm": "1 MHz"})
    results = Results({"gpu": "none", "before": {"clocks.sm": "2 MHz"}})
    assert gpu.run_sections([section], True, results, tmp_path, CpuMeter(1), "cpu"), capsys.readouterr().out
    saved = Results.load(tmp_path)
    cells = list(SECTIONS[section](True))
    assert list(saved.cells) == [cell.key for cell in cells]
    assert all(len(result.timings) > 1 for result in saved.cells.values())
    table = (tmp_path / "table.md").read_text()
    assert all(cell.case in table for cell in cells)
    assert "| clocks.sm | 2 MHz | 1 MHz |" in table


def test_full_cells_have_unique_keys() -> None:
    keys = [cell.key for cells in SECTIONS.values() for cell in cells(False)]
    assert len(set(keys)) == len(keys)


def test_peers_that_fail_are_left_out_and_named() -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise RuntimeError("not on this device\nat all")

    good, bad = Contestant("good", lambda: {"y": torch.ones(1)}), Contestant("bad", fail)
    race, failures = usable(Race((Contestant(OURS, good.run), bad, good)))
    assert [contestant.name for contestant in race.contestants] == [OURS, "good"]
    assert failures == {"bad": "RuntimeError: not on this device"}
    with pytest.raises(RuntimeError, match="not on this device"):
        usable(Race((Contestant(OURS, fail), good)))


def install(monkeypatch, name: str, **functions: object) -> None:
    """A package that has these functions."""
    for parent in [name.rsplit(".", depth)[0] for depth in range(name.count("."), 0, -1)]:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_attention_peers_get_their_layouts(monkeypatch) -> None:
    def sb_attn(q, k, v, *, attend_current):  # [B, H, T, D]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        output, remainder = ops.stick_attention(q, k, v, attend_current=attend_current, return_remainder=True)
        return output.transpose(1, 2), remainder.transpose(1, 2)

    def flash_attn_func(q, k, v, *, causal):  # [B, T, H, D]
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)

    install(monkeypatch, "stickbreaking_attention.sb_attn", sb_attn=sb_attn)
    install(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    found = peers.attention_peers()
    q, k, v = attention_inputs(20, 1, 3, 8, torch.float32)
    expected = ops.stick_attention(q.transpose(2, 3), k, v).transpose(2, 3)
    torch.testing.assert_close(found["stickbreaking-attention (Triton)"].bind(q, k, v)(), expected)
    softmax = found["flash-attn (softmax)"]
    assert softmax.bind(q, k, v)().shape == q.shape and not softmax.comparable


def test_scattermoe_gets_its_routing(monkeypatch) -> None:
    def parallel_linear(x, weight, k, experts, slots, ends, *, gates=None, grouped_in=False, grouped_out=False):
        assert torch.equal(ends, experts.bincount(minlength=len(weight)).cumsum(0))
        rows = x if grouped_in else x[slots // k]
        y = torch.stack([row @ weight[expert] for row, expert in zip(rows, experts, strict=True)])
        if grouped_out:
            return y
        by_slot = torch.empty_like(y)
        by_slot[slots] = y
        return (gates[..., None] * by_slot.unflatten(0, gates.shape)).sum(1)

    install(monkeypatch, "scattermoe.parallel_experts", parallel_linear=parallel_linear)
    (peer,) = peers.expert_peers().values()
    x, up, down = normal(9, 8), expert_weights(4, 8, 6, torch.float32, 1), expert_weights(4, 6, 8, torch.float32, 2)
    gates, expert_ids = random_gates(9, 4, 2)
    layout = ops.expert_layout(expert_ids, 4)
    torch.testing.assert_close(peer.bind(x, up, down, layout, gates)(), ops.expert_ffn(x, up, down, layout, gates))


def test_absent_packages_are_no_peers(monkeypatch) -> None:
    for name in ("stickbreaking_attention", "flash_attn", "scattermoe"):
        monkeypatch.setitem(sys.modules, name, None)
    assert peers.attention_peers() == peers.expert_peers() == {}


def test_unknown_section_and_no_gpu(capsys, monkeypatch) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nonsense"])
    assert "got nonsense" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "sees no GPU" in capsys.readouterr().err


def test_device_slug() -> None:
    assert path_part("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@needs_gpu
def test_meter_times_the_device() -> None:
    meter, x = CudaMeter(), torch.randn(1 << 26, device="cuda")
    least = x.nbytes / 10e12  # no memory is that fast
    assert least < meter.seconds(lambda: x + 1) < 1
    assert meter.peak_bytes(lambda: x + 1) == x.nbytes
    assert device.describe()["gpu"]
