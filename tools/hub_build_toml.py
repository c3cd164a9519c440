"""Writes build.toml, which describes the kernels to the builder of Hugging Face's kernel hub, into a folder:

    python tools/hub_build_toml.py .

Its sources are those of CMakeLists.txt and its flags those of cmake/. `pip install kernels` brings the format's own
parser, `kernels._rust.Build.open(FOLDER)`. The builder itself (Nix) is no Python package, and has not been run:
it will need glue for what the hub asks of a kernel, namely a registration without pybind11 under a name of its own per
build (csrc/bindings/module.cpp), and the CUDA kernels in the same library (csrc/bindings/cuda_library.cpp).
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST_TORCH = re.search(r"torch>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
CUDA_CAPABILITIES = ["8.0", "9.0a"]
KERNEL_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]


def listed(*patterns: str, without: str = "$^") -> list[str]:
    paths = sorted(path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return [path.relative_to(ROOT).as_posix() for path in paths if not re.search(without, path.name)]


def toml(value: str | int | list[str]) -> str:
    if isinstance(value, list):
        return f"[\n{''.join(f'  {toml(item)},{chr(10)}' for item in value)}]" if len(value) > 2 else str(value)
    return f'"{value}"' if isinstance(value, str) else str(value)


def tables() -> dict[str, dict[str, str | int | list[str]]]:
    """One kernel for each set of flags; those of the CPU are compiled for the baseline, which every processor has."""
    include = ["include", "csrc"]
    shared = {"depends": ["torch"], "include": include}
    return {
        "general": {
            "name": "moduleformer-ext",
            "version": 1,
            "edition": 5,
            "license": "Apache-2.0",
            "backends": ["cpu", "cuda"],
        },
        "torch": {
            "minver": OLDEST_TORCH,
            "include": include,
            "cxx-flags": ["-std=c++20"],
            "src": listed("bindings/*.cpp", without="^module.cpp$") + listed("core/aten_*.cpp"),
        },
        "kernel.launchers": {
            "backend": "cpu",
            **shared,
            "cxx-flags": ["-std=c++20", "-DMFX_HAVE_BASELINE=1"],
            "src": listed("*/*_cpu.cpp", "core/*.cpp", without="^aten_"),
        },
        "kernel.baseline": {
            "backend": "cpu",
            **shared,
            "cxx-flags": ["-std=c++20", "-DMFX_ISA=baseline", "-DMFX_ISA_BASELINE=1", *KERNEL_FLAGS],
            "src": listed("*/*_cpu_kernel.cpp"),
        },
        "kernel.cuda": {
            "backend": "cuda",
            **shared,
            "cuda-capabilities": CUDA_CAPABILITIES,
            "cuda-flags": ["-O3", "-DNDEBUG", "--expt-relaxed-constexpr"],
            "src": listed("*/*_cuda.cu", without="_sm90_cuda.cu$"),  # those need CUTLASS's headers
        },
    }


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.exit("hub_build_toml: name a folder that exists")
    text = "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in table.items())
        for name, table in tables().items()
    )
    (Path(arguments[0]) / "build.toml").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
