"""Checks that what the documentation names exists: paths, links, and symbols in backticks. Exits 1 and lists the rest.

A path is a word that begins with a folder of this repository (`csrc/...`), or one in backticks with a suffix of source
code; it may be given from any folder on (`core/amx.cpp`), with `*`, `<op>` or `X` for any name, or be one that a source
file speaks of. A symbol is a word in backticks with an underscore, a capital inside it or parentheses after it; it is
a word of some source file, or of a package of others (`torch.library.opcheck`).
"""

import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent

SOURCES = {".py", ".pyi", ".cpp", ".hpp", ".h", ".cu", ".cuh", ".cmake", ".sh", ".toml", ".ini", ".txt", ".map", ""}
SUFFIXES = r"(?:py|pyi|cpp|hpp|h|cu|cuh|cmake|sh|toml|ini|txt|md|json|png|so)"
FOREIGN = r"(?:torch|at|c10|aten|numpy|np|transformers|triton|cuda|cub|cute|cutlass|std|F|nn)(?:\.|::)"
# Names that belong to others although no package is written before them.
FOREIGN_NAMES = {"fully_shard", "flex_attention"}

SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
FILE = re.compile(rf"(?<![\w./*<>-])(?:\.{{0,2}}/)?[\w*<>/-]*[\w*>]\.{SUFFIXES}(?![\w/])")
SYMBOL = re.compile(r"(?<![\w.:$-])(?:[A-Za-z_]\w*(?:\.|::))*[A-Za-z_][\w*]*(?:\(\))?")
MAKE = re.compile(r"`make (?:-\S+ )*([a-z][\w-]*)")
BRACES = re.compile(r"([\w*./]*)\{(\w+(?:,\w+)+)\}([\w*./]*)")


class Tree:
    """The files of the repository and the words of its sources."""

    def __init__(self, root: Path, files: list[str]):
        self.root = root
        self.files = files
        self.folders = {f"{parent.as_posix()}/" for file in files for parent in Path(file).parents} - {"./"}
        tops = "|".join(sorted(re.escape(folder) for folder in self.folders if folder.count("/") == 1))
        self.under_top = re.compile(rf"(?<![\w./<>-])(?:{tops})[\w.*<>/-]*[\w*>/]")

    @cached_property
    def words(self) -> set[str]:
        words: set[str] = set()
        for file in self.files:
            if Path(file).suffix in SOURCES and (self.root / file).is_file():
                text = (self.root / file).read_text(encoding="utf-8", errors="ignore")
                words.update(re.findall(r"\w+", text), re.findall(r"\w+\.\w+", text))
        return words

    @cached_property
    def targets(self) -> set[str]:
        """What `make` makes, here or in a folder with a Makefile of its own."""
        makefiles = [self.root / file for file in self.files if Path(file).name == "Makefile"]
        return {name for path in makefiles for name in re.findall(r"^([a-z][\w-]*):", path.read_text(), re.MULTILINE)}

    @cached_property
    def names(self) -> list[str]:
        return [f"/{name}" for name in (*self.files, *self.folders)]

    def has_path(self, path: str) -> bool:
        """Whether some file or folder ends with these components."""
        pattern = re.sub(r"<\w+>|(?<![A-Za-z])X(?![A-Za-z])", "*", path).removeprefix("./").removeprefix("../")
        if any(
            fnmatch.fnmatchcase(name, f"*/{pattern}") or fnmatch.fnmatchcase(name, f"*/{pattern}/")
            for name in self.names
        ):
            return True
        return path in self.words or self.is_made(path)

    def is_made(self, path: str) -> bool:
        """Whether git ignores it: something that a build or a run makes."""
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=self.root).returncode == 0

    def has_symbol(self, symbol: str) -> bool:
        name = re.split(r"\.|::", symbol.removesuffix("()"))[-1]
        if "*" in name:
            return any(fnmatch.fnmatchcase(word, name) for word in self.words)
        return name in FOREIGN_NAMES or name in self.words


def is_symbol(text: str) -> bool:
    name = re.split(r"\.|::", text.removesuffix("()"))[-1]
    inner = re.search(r"[A-Za-z0-9]_(?:[A-Za-z0-9]{2}|\*)|[a-z][A-Z]", name)  # x_s is x with a subscript
    ours = not re.match(FOREIGN, text) and not name.startswith("CMAKE_") and "XX" not in name
    return bool(inner or text.endswith("()")) and ours


def expand_braces(text: str) -> str:
    """`a_{b,c}` is a_b and a_c."""
    return BRACES.sub(lambda match: " ".join(f"{match[1]}{part}{match[3]}" for part in match[2].split(",")), text)


def check(tree: Tree, doc: str, text: str) -> Iterator[str]:
    """What `doc`, a file of `tree` that holds `text`, names and the tree does not have."""
    fenced = False
    for number, line in enumerate(expand_braces(text).splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if fenced:
            continue
        missing = {path for path in tree.under_top.findall(line) if not tree.has_path(path)}
        missing |= {f"make {target}" for target in MAKE.findall(line) if target not in tree.targets}
        for span in SPAN.findall(line):
            missing |= {path for path in FILE.findall(span) if not tree.has_path(path)}
            code = FILE.sub(" ", tree.under_top.sub(" ", span))
            missing |= {name for name in SYMBOL.findall(code) if is_symbol(name) and not tree.has_symbol(name)}
        for target in LINK.findall(line):
            if "://" not in target and not (tree.root / doc).parent.joinpath(target).exists():
                missing.add(target)
        yield from (f"{doc}:{number}: names {name}, which does not exist" for name in sorted(missing))


def documents(files: list[str]) -> list[str]:
    """Documentation of what is: the CHANGELOG also speaks of what was, and reports are made by programs."""
    reports = re.compile(r"CHANGELOG\.md|benchmarks/results/.*|docs/cuda_(report|roofline)\.md")
    return [name for name in files if name.endswith(".md") and not reports.fullmatch(name)]


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    tree = Tree(ROOT, files)
    problems = [line for doc in documents(files) for line in check(tree, doc, (ROOT / doc).read_text(encoding="utf-8"))]
    print("\n".join(problems) or "docs: everything they name exists")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
