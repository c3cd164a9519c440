"""Which experts does each domain of text use?

    python examples/usage.py

As a command: moduleformer-ext usage runs/examples/base runs/examples/usage
"""

from tiny_model import FOLDER, LENGTH, tiny_model

from moduleformer_ext.surgery import divergences, plot_expert_usage, usage_table
from moduleformer_ext.train import evaluate


def main() -> None:
    model, data = tiny_model()
    scores = evaluate(model, data.held_out, segment_length=LENGTH)  # counts on the way: no pass of its own
    usage = {domain: score.usage for domain, score in scores.items()}

    print(usage_table(usage, model.config).splitlines()[0])
    print(*usage_table(usage, model.config).splitlines()[1:5], "...", sep="\n")
    for kind, pairs in divergences(usage).items():
        for first, others in pairs.items():
            for second, layers in others.items():
                print(f"{kind} experts: KL({first} || {second}) by layer {[round(value, 3) for value in layers]}")
    plot_expert_usage(FOLDER / "usage.png", usage)
    print(f"heat maps: {FOLDER / 'usage.png'}")


if __name__ == "__main__":
    main()
