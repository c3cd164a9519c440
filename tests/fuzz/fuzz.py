"""Calls every op with arguments that may be anything, in child processes: ``fuzz.py --cases N [--first SEED]``.

A case is its seed. Valid calls must agree with the reference; invalid ones must raise a clear error: no crash, no hang,
no result that depends on uninitialised memory. ``fuzz.py --first SEED --cases 1`` repeats a case.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = Path(__file__).parent / "cases.py"
SECONDS_PER_CASE = 5  # on average, the start of a process aside; far beyond what one takes


def fuzz(first: int, count: int) -> list[str]:
    """What is wrong with the cases of these seeds."""
    problems, last = [], first + count
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "seed"
        while first < last:
            command = [sys.executable, str(CASES), str(first), str(last), str(report)]
            try:
                limit = 60 + SECONDS_PER_CASE * (last - first)
                child = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
                output, ending = child.stdout, f"ended with status {child.returncode}\n{child.stderr[-3000:]}"
                done = child.returncode == 0
            except subprocess.TimeoutExpired as expired:
                output, ending, done = (expired.stdout or b"").decode(), "did not end", False
            problems += [f"seed {text}" for text in re.split(r"(?m)^seed ", output)[1:]]
            if done:
                break
            seed = int(report.read_text()) if report.exists() else first
            problems.append(f"seed {seed}: the process {ending}")
            first = seed + 1
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    options = parser.parse_args()
    problems = fuzz(options.first, options.cases)
    print(*problems, sep="\n")
    print(f"{options.cases} cases, {len(problems)} of them wrong")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
