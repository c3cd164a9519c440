import subprocess
import sys

import pytest

# Allocates and frees the same large block, touching every page, and prints the page faults of doing it again.
SCRIPT = """
import resource, sys
import torch
from moduleformer_ext.heap import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_kept_memory_is_not_faulted_in_again() -> None:
    def faults(mode: str) -> int:
        return int(subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, check=True).stdout)

    # Not zero: where the heap ends just below a mapping, glibc starts another one. Addresses differ from process to
    # process, and few lie so badly that it does so again and again.
    assert min(faults("keep") for _ in range(3)) < faults("default") / 2
