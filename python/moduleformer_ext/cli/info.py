"""`moduleformer-ext info`."""

import json
from itertools import groupby

from moduleformer_ext._extension import build_info, cuda_kernels
from moduleformer_ext.cli.source import AsJson
from moduleformer_ext.display import facts


def run(*, as_json: AsJson = False) -> int:
    """Print what the extension was built with and what it can run here."""
    information, kernels = build_info(), cuda_kernels()
    if as_json:
        listed = [{"op": op, "name": name, "arch": arch} for op, name, arch in kernels]
        print(json.dumps({**information, "cuda_kernels": listed}, indent=2))
        return 0
    print(facts(list(information.items())))
    for (op, arch), rows in groupby(kernels, key=lambda row: (row[0], row[2])):
        print(f"\nCUDA kernels of {op}, sm_{arch} and newer")
        print("\n".join(f"  {name}" for _, name, _ in rows))
    return 0
