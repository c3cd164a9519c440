"""The package as a whole: what importing it does, and what the README shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_importing_the_package_loads_nothing_native():
    result = run("import sys, moduleformer_ext; print('torch' in sys.modules, 'moduleformer_ext._C' in sys.modules)")
    assert result.stdout.split() == ["False", "False"], result.stderr


def test_importing_the_ops_touches_no_gpu():
    result = run("import torch, moduleformer_ext.ops; print(torch.cuda.is_initialized())")
    assert result.stdout.split() == ["False"], result.stderr


@pytest.mark.parametrize(
    "pretend",
    [
        "import torch; torch.__version__ = '99.1.0'; ",
        "import sys, torch; sys.modules['moduleformer_ext._C'] = None; ",
    ],
    ids=["other torch", "extension missing"],
)
def test_an_extension_that_does_not_fit_says_what_to_do(pretend):
    result = run(pretend + "import moduleformer_ext.ops")
    assert result.returncode != 0
    assert "pip install --no-build-isolation" in result.stderr
    assert "torch" in result.stderr.splitlines()[-1]


def test_the_extension_has_every_op_as_a_function():
    from moduleformer_ext import _C, ops

    ids = torch.tensor([[1, 0], [1, 2]])
    for expected, tensor in zip(ops.expert_layout(ids, 3), _C.expert_layout(ids, num_experts=3), strict=False):
        assert torch.equal(tensor, expected)
    assert _C.expert_layout.__doc__.splitlines()[-1] == str(torch.ops.moduleformer_ext.expert_layout.default._schema)

    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, 5)
    layout = ops.expert_layout(ids, 3)
    _C.grouped_gemm(
        x, [weight], *layout[1:], x_order="token", out_order="token", gates=None, activation=None, bias=None
    ).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("isa", ["nonsense", "AVX2"])
def test_an_unknown_instruction_set_is_refused(isa):
    code = "import os; os.environ['MFX_CPU_ISA'] = {!r}; import moduleformer_ext._extension as e; e.build_info()"
    result = run(code.format(isa))
    assert result.returncode != 0
    assert f"got '{isa}'" in result.stderr


@pytest.mark.parametrize(("value", "reason"), [("GPU", "must be CUDA or CPU"), ("CPU", "needs the emulated device")])
def test_cuda_kernels_serve_cpu_tensors_on_the_emulated_device_alone(value, reason):
    code = (
        "import os; os.environ['MFX_CUDA_DISPATCH'] = {!r}; os.environ.pop('LD_PRELOAD', None)\n"
        "import moduleformer_ext.ops"
    )
    result = run(code.format(value))
    assert result.returncode != 0
    assert reason in result.stderr.splitlines()[-1]


def test_readme_example_of_the_ops_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(blocks[0], "README.md", "exec"), {})


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="these are checks of a checkout")
@pytest.mark.parametrize("script", ["check_layers.py", "check_docs.py"])
def test_layers_and_documentation(script):
    result = subprocess.run([sys.executable, ROOT / "tools" / script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
