"""Count the experts' use, prune, insert new experts and train them alone: the library without the command line.

    python examples/prune_and_extend.py

The model is random and small, so that this takes a second; load yours with `MoLMForCausalLM.from_pretrained`.
"""

import torch

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.surgery import (
    compare,
    count_usage,
    insert_experts,
    plan_by_size,
    prune,
    routing_penalty,
    set_trainable,
)


def main() -> None:
    torch.manual_seed(0)
    model = MoLMForCausalLM(MoLMConfig.preset("molm-nano")).eval()
    text = torch.randint(model.config.vocab_size, (4, 32))

    usage = count_usage(model, [text])
    plan = plan_by_size(model.config, usage, remaining=0.8, keep_normaliser=True)
    print(plan.summary())
    small = prune(model, plan)

    extended = insert_experts(small, attention=1, ffn=2, init="copy")
    set_trainable(extended.train(), "new")
    optimizer = torch.optim.AdamW([p for p in extended.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        output = extended(text, labels=text, output_routes=True)
        (output.loss + 0.1 * routing_penalty(extended, output.routes)).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(compare(small, extended).summary())


if __name__ == "__main__":
    main()
