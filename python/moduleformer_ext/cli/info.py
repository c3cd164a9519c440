"""`moduleformer-ext info`."""

import argparse
import json
from itertools import groupby

from moduleformer_ext._extension import build_info, cuda_kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON, each CUDA kernel with its architecture")


def run(options: argparse.Namespace) -> int:
    """Print what the extension was built with and what it can run here."""
    information, kernels = build_info(), cuda_kernels()
    if options.json:
        listed = [{"op": op, "name": name, "arch": arch} for op, name, arch in kernels]
        print(json.dumps({**information, "cuda_kernels": listed}, indent=2))
        return 0
    width = max(len(name) for name in information)
    for name, value in information.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{name:<{width}}  {shown}")
    for (op, arch), rows in groupby(kernels, key=lambda row: (row[0], row[2])):
        print(f"\nCUDA kernels of {op}, sm_{arch} and newer")
        print("\n".join(f"  {name}" for _, name, _ in rows))
    return 0
