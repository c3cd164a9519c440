"""Take one domain's part of a model out, as a model of its own.

    python examples/extract_domain.py

As a command: moduleformer-ext prune runs/examples/base runs/examples/prose --domain prose --remaining 0.7
"""

from tiny_model import FOLDER, batches, bits_per_byte, tiny_model

from moduleformer_ext.surgery import count_usage, plan_by_size, prune


def main() -> None:
    model, data = tiny_model()
    parts = {}
    for domain, text in data.train.items():
        usage = count_usage(model, batches(text, 12))
        parts[domain] = prune(model, plan_by_size(model.config, usage, remaining=0.7))
    for domain, text in data.held_out.items():
        by_part = ", ".join(f"{bits_per_byte(part, text):.3f} with the part for {name}" for name, part in parts.items())
        print(f"{domain}: {bits_per_byte(model, text):.3f} bits per byte with all experts, {by_part}")
    parts["prose"].save_pretrained(FOLDER / "prose")


if __name__ == "__main__":
    main()
