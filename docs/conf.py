"""The documentation site: ``make docs`` builds it in build/site from the Markdown files of the whole repository.

The source folder is the root, so that the links by which the files refer to one another are those of the site, too.
"""

import contextlib
import importlib
import inspect
import io
import os
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "python"))
os.environ["COLUMNS"] = "100"  # of the pages of --help

PUBLIC = ("ops", "nn", "models", "surgery", "train", "data", "distributed", "hf", "reference")
"""The packages all of whose public names have to be on a page."""

project = "moduleformer_ext"
author = project
version = (ROOT / "python/moduleformer_ext/_version.py").read_text().split('"')[-2]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "benchmarks/**.md", "csrc/**.md", "tools/cudasim/*.md"]
exclude_patterns = ["build*", "**/.*", "tests", "third_party", "python", "include", "runs", "dist"]

myst_heading_anchors = 4
nitpicky = True  # a name of ours in a docstring that leads nowhere is a warning, and a warning is an error
nitpick_ignore_regex = [
    ("py:.*", r"(?!moduleformer_ext\b).*"),
    ("py:class", r"moduleformer_ext\..*\.(Model|Found)"),  # type variables
]

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"moduleformer_ext {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # index.html, which leads to docs/index.html
html_copy_source = False
html_show_copyright = False
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True


class CommandHelp(Directive):
    """What ``moduleformer-ext VERB --help`` prints, for every verb, a section each."""

    def run(self) -> list[nodes.Node]:
        from moduleformer_ext import cli

        sections = []
        for verb in cli.VERBS:
            section = nodes.section(ids=[verb], names=[verb])
            section += nodes.title(text=verb)
            page = io.StringIO()
            with contextlib.redirect_stdout(page):
                cli.main([verb, "--help"])
            section += nodes.literal_block(text=page.getvalue().strip(), language="none")
            sections.append(section)
        return sections


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns about every public name that is on no page."""
    described = env.get_domain("py").objects
    modules = [importlib.import_module(f"moduleformer_ext.{package}") for package in PUBLIC]
    for module in modules:  # grows: public modules of public packages
        for name in getattr(module, "__all__", ()):
            if f"{module.__name__}.{name}" not in described:
                logging.getLogger(__name__).warning(
                    "%s.%s is on no page: an autodata or automodule line of docs/api", module.__name__, name
                )
            if inspect.ismodule(part := getattr(module, name)):
                modules.append(part)


def find_by_package(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.TextElement):
    """Docstrings name a function by its module; its page shows it as a name of the package."""
    parts = node["reftarget"].split(".")
    if node.get("refdomain") != "py" or parts[0] != project or len(parts) < 4:
        return None
    target = ".".join((*parts[:-2], parts[-1]))
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, text)


def drop_docstring_of_the_type(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """A constant without a docstring has that of its type."""
    if what == "data" and lines and lines[0] in (type(obj).__doc__ or ""):
        lines.clear()


def setup(app: Sphinx) -> None:
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-docstring", drop_docstring_of_the_type)
    app.connect("missing-reference", find_by_package)
    app.connect("env-check-consistency", check_public_names)
