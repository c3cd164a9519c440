"""A Mixtral of transformers trains on our experts and routers, then generates on its own and on ours.

python examples/hf_experts.py
"""

import time

import torch
from tiny_model import batches, read_text, tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig

from moduleformer_ext.hf import experts


def main() -> None:
    base, data = tiny_model()
    text = read_text("tests/ops", data)
    config = MixtralConfig(
        vocab_size=base.config.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts.NAME)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches(text, 20):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss after {20} steps: {loss.item():.3f}")

    model.eval()
    prompt, said = batch[:1, :16], {}
    for implementation in ("eager", "grouped_mm", experts.NAME):
        model.set_experts_implementation(implementation)
        begin = time.perf_counter()
        said[implementation] = model.generate(prompt, max_new_tokens=16, do_sample=False).tolist()
        print(f"{implementation}: 16 tokens in {time.perf_counter() - begin:.2f} s")
    print(f"the same tokens: {said['eager'] == said[experts.NAME]}")


if __name__ == "__main__":
    main()
