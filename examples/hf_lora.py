"""LoRA on experts and routers with peft: train, merge, compare.

python examples/hf_lora.py
"""

import torch
from hf_generate import hf_directory
from peft import LoraConfig, get_peft_model
from tiny_model import batches, bits_per_byte, read_text, tiny_model
from transformers import AutoModelForCausalLM

from moduleformer_ext import hf

EXPERTS = ["mlpf.experts.weight", "mlpf.output_experts.weight", "q_proj.experts.weight", "q_proj.output_experts.weight"]


def main() -> None:
    base, data = tiny_model()
    text = read_text("tests/ops", data)
    config = LoraConfig(
        r=4,
        task_type="CAUSAL_LM",
        target_modules=r".*\.w_gate\.[03]",  # the routers
        target_parameters=EXPERTS,
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(hf_directory()), config)
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for batch in batches(text, 20):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    merged = hf.to_native(model.merge_and_unload()).eval()
    print(f"new text: {bits_per_byte(base, text):.3f} bits per byte before, {bits_per_byte(merged, text):.3f} after")


if __name__ == "__main__":
    main()
