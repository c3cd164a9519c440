"""The messages that docs/faq.md quotes are those that the sources have."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"python": ("*.py",), "csrc": ("*.cpp", "*.hpp", "*.cu"), "cmake": ("*.cmake",)}
MESSAGES = re.findall(r"```text\n(.*?)\n```", (ROOT / "docs/faq.md").read_text(encoding="utf-8"), re.DOTALL)


def parts(message: str) -> list[str]:
    """What a source has in one piece: between what varies, and what a check of the bindings puts between its own."""
    pieces = re.split(r"…| must |, got", message)
    return [piece.strip(" ':;") for piece in pieces if len(piece) > 8]


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """Every source file, its string literals that stand one after another joined."""
    files = [path for folder, kinds in FOLDERS.items() for kind in kinds for path in (ROOT / folder).rglob(kind)]
    texts = (path.read_text(encoding="utf-8") for path in files)
    return [re.sub(r'"\s*\n?\s*f?"', "", text) for text in texts]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_exists(message: str, sources: list[str]) -> None:
    wanted = parts(message)
    assert wanted
    assert any(all(part in text for part in wanted) for text in sources), wanted


def test_another_message_would_not_be_found(sources: list[str]) -> None:
    wanted = parts("run: '…' already holds a train; continue it with --resume")
    assert not any(all(part in text for part in wanted) for text in sources)
