"""`moduleformer-ext compare`."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moduleformer_ext.cli.source import AsJson, First, locate
from moduleformer_ext.display import table
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import Comparison, compare


def run(
    first: First,
    second: Annotated[Path, Parameter(help="the model to compare it with")],
    /,
    *,
    as_json: AsJson = False,
) -> int:
    """Print which experts changed, and by how much, came and went."""
    models = [MoLMForCausalLM.from_pretrained(locate(path)[0]) for path in (first, second)]
    found = compare(*models)
    print(json.dumps(found.to_dict(), indent=2) if as_json else _as_tables(found))
    return 0


def _as_tables(found: Comparison) -> str:
    """Experts by layer, then the other parameters; a change is relative to the norm of what was."""
    rows = []
    for site, experts in found.experts.items():
        changed = {i: change for i, change in experts.matrices.items() if change or experts.rows[i]}
        shown = ", ".join(f"{i} ({change:.2g})" for i, change in changed.items())
        gone, new = (", ".join(map(str, identities)) for identities in (experts.only_first, experts.only_second))
        rows.append((str(site), len(experts.matrices) - len(changed), shown, gone, new))
    moved = [(name, f"{change:.2g}") for name, change in found.others.items() if change]
    tables = [table(["experts", "the same", "changed", "only in the first", "only in the second"], rows)]
    if moved:
        tables.append(table(["parameter", "changed by"], moved))
    return "\n\n".join([*tables, f"other parameters: {len(found.others) - len(moved)} the same, {len(moved)} changed"])
