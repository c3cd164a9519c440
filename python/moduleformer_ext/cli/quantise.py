"""`moduleformer-ext quantise`."""

from typing import Literal

from cyclopts import Parameter

from moduleformer_ext.cli.source import Model, Output, check_new, locate, new_model_directory
from moduleformer_ext.models import MoLMForCausalLM, quantise_experts
from moduleformer_ext.models.checkpoint import WEIGHTS_FILE
from moduleformer_ext.records import Record


@Parameter(name="*")
class Options(Record):
    """To what."""

    bits: Literal["8", "4"] = "8"
    """of a number"""


def run(model: Model, output: Output, /, *, options: Options = Options()) -> int:
    """Write a model with its experts rounded to 8 or 4 bits, which take less memory and answer faster; they cannot be
    trained. With 4 bits it loses a little of what it knew: `eval` says how much.
    """
    check_new(output, model)
    directory, tokenizer = locate(model)
    quantised = quantise_experts(MoLMForCausalLM.from_pretrained(directory), int(options.bits))
    with new_model_directory(output, tokenizer) as scratch:
        quantised.save_pretrained(scratch)
        stored = (scratch / WEIGHTS_FILE).stat().st_size
    print(f"wrote {output} (experts of {options.bits} bits, {stored / 2**20:.1f} MiB)")
    return 0
