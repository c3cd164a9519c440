"""`python -m moduleformer_ext.hf …`: the `transformers` command, which then knows MoLM: `serve DIRECTORY`, `chat`."""

import sys

import transformers
from transformers.cli.transformers import main

from moduleformer_ext import hf

if __name__ == "__main__":
    for model in (hf.ModuleFormerForCausalLM, hf.ModuleFormerForSequenceClassification):
        setattr(transformers, model.__name__, model)  # where the server looks for architectures
    sys.exit(main())
