"""Enforces the dependency directions of docs/architecture.md and the size of source files. Exits 1 and lists every
import and file that breaks a rule."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "moduleformer_ext"

# Python: what each room may import besides itself. Rooms are the package's direct children.
COMMON = {"types", "quantised", "_version", "display", "files", "heap", "records"}
PYTHON_LAYERS: dict[str, set[str]] = {
    "_version": set(),
    "types": set(),
    "quantised": set(),
    "heap": set(),
    "display": set(),
    "records": set(),
    "files": {"records"},
    "_extension": {"_C"},
    "reference": COMMON,
    "ops": COMMON | {"_extension"},
    "nn": COMMON | {"ops"},
    "models": COMMON | {"ops", "nn"},
    "surgery": COMMON | {"ops", "nn", "models"},
    "distributed": COMMON | {"ops", "nn", "models"},
    "data": COMMON,
    "train": COMMON | {"ops", "nn", "models", "surgery", "data", "distributed"},
    "hf": COMMON | {"ops", "nn", "models", "data"},
    "cli": COMMON | {"_extension", "ops", "nn", "models", "surgery", "data", "train", "hf", "distributed"},
    "__init__": COMMON,
}

# Optional packages: the rooms that may import them.
OPTIONAL: dict[str, set[str]] = {name: {"hf"} for name in ("transformers", "accelerate", "peft")}

CODE = (".py", ".pyi", ".cpp", ".hpp", ".h", ".cu", ".cuh", ".sh", ".cmake", "CMakeLists.txt", "Makefile")
MAX_LINES = 500

# C++: folder -> pattern of includes that are forbidden there.
TORCH = r"^(torch|ATen|c10|pybind11)/"


def python_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute module name of every import; ``from package import a`` counts as ``package.a``."""
    folder = path.relative_to(ROOT / "python").parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def check_python() -> Iterator[str]:
    package = ROOT / "python" / PACKAGE
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        where = path.relative_to(ROOT)
        if room not in PYTHON_LAYERS:
            yield f"{where}: the room '{room}' is not in tools/check_layers.py"
            continue
        for line, name in python_imports(path):
            parts = name.split(".")
            if room not in OPTIONAL.get(parts[0], {room}):
                yield f"{where}:{line}: {room} must not import {parts[0]}, an optional package"
            if parts[0] != PACKAGE or len(parts) == 1:
                continue
            if parts[1] != room and parts[1] not in PYTHON_LAYERS[room]:
                yield f"{where}:{line}: {room} must not import {parts[1]}"


def cpp_rules(path: Path) -> Iterator[tuple[str, str]]:
    parts = path.relative_to(ROOT).parts
    sees_torch = "bindings" in parts or path.name.startswith("aten_")
    if not sees_torch:
        yield TORCH, "only csrc/bindings and csrc/core/aten_*.cpp may see torch"
        yield r"^bindings/", "nothing but the bindings includes bindings"
    if parts[0] == "include":
        yield r"^(?!moduleformer_ext/)[a-z_]+/", "public headers include public headers only"
    if parts[:2] == ("csrc", "core"):
        yield r"^(?!core/|moduleformer_ext/common|ATen/|c10/|sys/)[a-z_0-9]+/", "core stands on core alone"
    if parts[:2] == ("csrc", "ptx"):
        yield r"^(?!ptx/|moduleformer_ext/common|cuda)[a-z_0-9]+/", "ptx stands on ptx alone"
    if parts[:2] == ("csrc", "tile"):
        allowed = "tile/|ptx/|moduleformer_ext/common|cuda|cute/|cutlass/"
        yield rf"^(?!{allowed})[a-z_0-9]+/", "tile stands on tile, ptx and CUTLASS alone"


def check_cpp() -> Iterator[str]:
    include = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')
    for folder in ("csrc", "include"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in {".hpp", ".cpp", ".cu", ".cuh", ".h"}:
                continue
            for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                match = include.match(text)
                if not match:
                    continue
                for pattern, reason in cpp_rules(path):
                    if re.match(pattern, match[1]):
                        yield f"{path.relative_to(ROOT)}:{number}: includes {match[1]}: {reason}"


def too_long(name: str, text: str) -> Iterator[str]:
    lines = text.count("\n")
    if name.endswith(CODE) and lines > MAX_LINES:
        yield f"{name}: has {lines} lines, more than {MAX_LINES}; give each idea a file of its own"


def check_sizes() -> Iterator[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        if name.endswith(CODE) and (ROOT / name).exists():
            yield from too_long(name, (ROOT / name).read_text(encoding="utf-8"))


def main() -> int:
    problems = [*check_python(), *check_cpp(), *check_sizes()]
    print("\n".join(problems) or "layers: every import points the right way, no file is too long")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
