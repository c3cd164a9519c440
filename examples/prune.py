"""Remove the experts that the text uses least: a smaller model, not a masked one.

    python examples/prune.py

As a command: moduleformer-ext prune runs/examples/base runs/examples/small --remaining 0.7
"""

from tiny_model import FOLDER, batches, bits_per_byte, tiny_model

from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import count_parameters, count_usage, plan_by_size, prune


def main() -> None:
    model, data = tiny_model()
    usage = count_usage(model, (batch for stream in data.train.values() for batch in batches(stream, 8)))
    plan = plan_by_size(model.config, usage, remaining=0.7, keep_normaliser=True)
    print(plan.summary())  # all that --dry-run does

    prune(model, plan).save_pretrained(FOLDER / "small")
    small = MoLMForCausalLM.from_pretrained(FOLDER / "small")
    for domain, text in data.held_out.items():
        print(f"{domain}: {bits_per_byte(model, text):.3f} -> {bits_per_byte(small, text):.3f} bits per byte")
    prompt = next(batches(data.held_out["code"], 1))[:1, :20]
    tokens = small.generate(prompt, max_new_tokens=20)
    print(f"{count_parameters(small.config)} parameters write: {data.tokenizer.decode(tokens[0].tolist())!r}")


if __name__ == "__main__":
    main()
