"""`moduleformer-ext info`."""

import argparse

from moduleformer_ext._extension import build_info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: none."""


def run(_options: argparse.Namespace) -> int:
    """Print what the extension was built with and what it can run here."""
    information = build_info()
    width = max(len(name) for name in information)
    for name, value in information.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{name:<{width}}  {shown}")
    return 0
