"""What the model writes after the beginning of a held-out document of each domain."""

import torch

from moduleformer_ext.data import Dataset
from moduleformer_ext.models import MoLMForCausalLM

_PROMPT_TOKENS = 24


def generate_samples(
    model: MoLMForCausalLM,
    dataset: Dataset,
    *,
    max_new_tokens: int = 120,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """Return one titled sample per domain."""
    sections = []
    for domain in dataset.domains:
        prompt = dataset.held_out[domain].tokens[: _PROMPT_TOKENS + 1].astype("int64")
        generated = model.generate(
            torch.from_numpy(prompt).unsqueeze(0).to(next(model.parameters()).device),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        beginning = dataset.tokenizer.decode(prompt.tolist())
        text = dataset.tokenizer.decode(generated[0].tolist(), skip_special_tokens=False)
        sections.append(f"--- {domain} (given: {beginning!r})\n{text}\n")
    return "\n".join(sections)
