"""Insert new experts and train them alone on new text; the old ones keep their bits.

    python examples/extend.py

As commands:
    moduleformer-ext extend runs/examples/base runs/examples/larger --attention 1 --ffn 2 --init copy
    moduleformer-ext finetune runs/examples/larger --run runs/examples/cpp --text cpp=csrc --trainable new \
        --routing-penalty 0.01 --steps 40
"""

import torch
from tiny_model import FOLDER, batches, bits_per_byte, read_text, tiny_model

from moduleformer_ext.data import TokenStream
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import insert_experts, routing_penalty, set_trainable


def learn(model: MoLMForCausalLM, text: TokenStream, *, seed: int = 0) -> MoLMForCausalLM:
    """The model with new experts, which have read the text."""
    extended = insert_experts(model, attention=1, ffn=2, init="copy", seed=seed)
    set_trainable(extended.train(), "new")
    optimizer = torch.optim.AdamW([p for p in extended.parameters() if p.requires_grad], lr=3e-3)
    for batch in batches(text, 40):
        output = extended(batch, labels=batch, output_routes=True)
        (output.loss + 0.01 * routing_penalty(extended, output.routes)).backward()
        optimizer.step()
        optimizer.zero_grad()
    set_trainable(extended.eval(), "all")
    return extended


def main() -> None:
    model, data = tiny_model()
    cpp = read_text("csrc", data)
    extended = learn(model, cpp)
    for name, text in {"new text": read_text("include", data), **data.held_out}.items():
        print(f"{name}: {bits_per_byte(model, text):.3f} -> {bits_per_byte(extended, text):.3f} bits per byte")
    extended.save_pretrained(FOLDER / "larger")


if __name__ == "__main__":
    main()
