"""One MoLM block, forward, backward and a step of decoding: `python block_run.py OUT DTYPE` saves what came out."""

import sys

import torch
from safetensors.torch import save_file

from moduleformer_ext.models import ExpertsConfig, MoLMConfig, MoLMForCausalLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG = MoLMConfig(
    vocab_size=96,
    n_embd=64,
    n_layer=1,
    n_head=2,
    attention=ExpertsConfig(hidden=32, num_experts=4),
    ffn=ExpertsConfig(hidden=48, num_experts=6),
    gating_size=16,
    aux_loss_weight=0.1,
)
PROMPT = 21


def run_block(dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Logits, losses and every gradient of a training pass, and the logits of a token decoded after a prompt."""
    torch.manual_seed(0)
    model = MoLMForCausalLM(CONFIG).to(device, dtype)
    tokens = torch.randint(CONFIG.vocab_size, (2, 37)).to(device)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    found = {"logits": output.logits, "loss": output.loss, "aux_loss": output.aux_loss}
    found |= {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        past = model(tokens[:, :PROMPT], use_cache=True).past_key_values
        found["decoded"] = model(tokens[:, PROMPT : PROMPT + 1], past_key_values=past, use_cache=True).logits
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in found.items()}


if __name__ == "__main__":
    save_file(run_block(DTYPES[sys.argv[2]], torch.device("cpu")), sys.argv[1])
