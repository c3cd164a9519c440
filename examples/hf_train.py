"""Train a model with transformers' Trainer and take it back.

python examples/hf_train.py
"""

from hf_generate import hf_directory
from tiny_model import FOLDER, LENGTH, bits_per_byte, read_text, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moduleformer_ext import hf


def main() -> None:
    base, data = tiny_model()
    text = read_text("tests/ops", data)
    pieces = text.tokens[: len(text.tokens) // LENGTH * LENGTH].reshape(-1, LENGTH).astype("int64")
    examples = [{"input_ids": piece, "labels": piece} for piece in pieces]

    arguments = TrainingArguments(
        output_dir=str(FOLDER / "hf_train"),
        per_device_train_batch_size=8,
        max_steps=20,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = AutoModelForCausalLM.from_pretrained(hf_directory())
    Trainer(model, arguments, train_dataset=examples).train()
    trained = hf.to_native(model).eval()
    print(f"new text: {bits_per_byte(base, text):.3f} bits per byte before, {bits_per_byte(trained, text):.3f} after")


if __name__ == "__main__":
    main()
