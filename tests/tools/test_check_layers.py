"""The rules of tools/check_layers.py."""

import pytest


@pytest.mark.parametrize(("lines", "problems"), [(500, 0), (501, 1)])
@pytest.mark.parametrize("name", ["csrc/core/amx.cpp", "tools/cudasim/Makefile", "tests/test_package.py"])
def test_a_source_file_has_500_lines_at_most(layers, name, lines, problems):
    assert len(list(layers.too_long(name, "x\n" * lines))) == problems


def test_a_document_may_be_longer(layers):
    assert not list(layers.too_long("docs/build.md", "x\n" * 501))


@pytest.mark.parametrize(
    ("path", "include", "allowed"),
    [
        ("csrc/bindings/ops.cpp", "torch/library.h", True),
        ("csrc/core/aten_gemm.cpp", "ATen/core/Tensor.h", True),
        ("csrc/route_topk/route_topk_cpu.cpp", "ATen/core/Tensor.h", False),
        ("csrc/route_topk/route_topk_cpu.cpp", "core/simd.hpp", True),
        ("csrc/core/amx.cpp", "route_topk/gates.hpp", False),
        ("csrc/ptx/mma.cuh", "cuda_bf16.h", True),
        ("csrc/ptx/mma.cuh", "core/simd.hpp", False),
        ("csrc/ptx/mma.cuh", "tile/operand.cuh", False),
        ("csrc/tile/operand.cuh", "ptx/mma.cuh", True),
        ("csrc/tile/operand.cuh", "grouped_gemm/tile.cuh", False),
        ("include/moduleformer_ext/route_topk.hpp", "moduleformer_ext/common.hpp", True),
        ("include/moduleformer_ext/route_topk.hpp", "cutlass/cutlass.h", False),
    ],
)
def test_includes_point_one_way(layers, path, include, allowed):
    broken = [reason for pattern, reason in layers.cpp_rules(layers.ROOT / path) if layers.re.match(pattern, include)]
    assert bool(broken) != allowed


def test_optional_packages_stay_in_their_room(layers, tmp_path, monkeypatch):
    package = tmp_path / "python" / "moduleformer_ext"
    for room in ("hf", "cli"):
        (package / room).mkdir(parents=True)
        (package / room / "a.py").write_text("def f():\n    from transformers import AutoModel\n")
    monkeypatch.setattr(layers, "ROOT", tmp_path)
    assert list(layers.check_python()) == [
        "python/moduleformer_ext/cli/a.py:2: cli must not import transformers, an optional package"
    ]
