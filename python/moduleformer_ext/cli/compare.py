"""`moduleformer-ext compare`."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moduleformer_ext.cli.source import AsJson, First, locate
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import compare


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
    print(json.dumps(found.to_dict(), indent=2) if as_json else found.summary())
    return 0
