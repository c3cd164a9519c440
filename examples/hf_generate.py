"""A model of ours in transformers: one directory, the pipeline, beams.

    python examples/hf_generate.py

The directory as a command: moduleformer-ext convert runs/examples/base runs/examples/hf --to hf
"""

from pathlib import Path

from tiny_model import FOLDER, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from moduleformer_ext import hf
from moduleformer_ext.data.dataset import TOKENIZER

DIRECTORY = FOLDER / "hf"


def hf_directory() -> Path:
    """The examples' model as transformers reads it."""
    if not (DIRECTORY / "config.json").exists():
        model, data = tiny_model()
        data.tokenizer.save(str(FOLDER / TOKENIZER))
        hf.save_directory(model, DIRECTORY, FOLDER / TOKENIZER)
    return DIRECTORY


def main() -> None:
    directory = hf_directory()
    write = pipeline("text-generation", model=str(directory))
    print(write("def main(", max_new_tokens=16, do_sample=False)[0]["generated_text"])

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory)
    prompts = tokenizer(["import ", "The kernels "], return_tensors="pt", padding=True)
    beams = model.generate(**prompts, num_beams=4, max_new_tokens=8)
    print(*(f"beam search: {text!r}" for text in tokenizer.batch_decode(beams, skip_special_tokens=True)), sep="\n")


if __name__ == "__main__":
    main()
