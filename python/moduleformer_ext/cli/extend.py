"""`moduleformer-ext extend`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from moduleformer_ext.cli.source import Model, Output, check_new, locate, new_model_directory
from moduleformer_ext.cli.usage import read_counts
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.records import Record, Seed, Text
from moduleformer_ext.surgery import ExpertUsage, count_parameters, insert_experts

_Numbers = tuple[Annotated[int, Field(ge=0, le=2**16)], ...]


@Parameter(name="*")
class Options(Record):
    """What is new. Train it with `moduleformer-ext finetune --trainable new`."""

    attention: _Numbers = (0,)
    """new attention experts: one number, or one per layer"""
    ffn: _Numbers = (0,)
    """new feed-forward experts: one number, or one per layer"""
    init: Literal["random", "copy"] = "random"
    """copy: from experts of the layer"""
    usage: Path | None = None
    """folder of counts that `usage` wrote: copy the most used experts"""
    domain: Text | None = None
    """the domain of --usage that counts (default: its only one)"""
    seed: Seed = 0
    """of what is random"""


def run(source: Model, output: Output, /, *, options: Options = Options()) -> int:
    """Write a model with more experts; train them with `moduleformer-ext finetune --trainable new`."""
    check_new(output, source)
    directory, tokenizer = locate(source)
    usage = _usage(options)
    model = MoLMForCausalLM.from_pretrained(directory)
    attention, ffn = (given[0] if len(given) == 1 else given for given in (options.attention, options.ffn))
    extended = insert_experts(model, attention=attention, ffn=ffn, init=options.init, usage=usage, seed=options.seed)
    with new_model_directory(output, tokenizer) as scratch:
        extended.save_pretrained(scratch)
    before, after = count_parameters(model.config), count_parameters(extended.config)
    print(f"wrote {output}: {before} -> {after} parameters, {after - before} of them new")
    return 0


def _usage(options: Options) -> ExpertUsage | None:
    if options.usage is None:
        return None
    by_domain = read_counts(options.usage)
    domain = options.domain or (next(iter(by_domain)) if len(by_domain) == 1 else None)
    if domain not in by_domain:
        raise ValueError(f"--domain must be one of {', '.join(by_domain)}, got {options.domain}")
    return by_domain[domain]
