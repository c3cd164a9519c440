"""Follow every expert from one model to another, by its identity.

    python examples/compare.py

As a command: moduleformer-ext compare runs/examples/base runs/examples/larger
"""

from extend import learn
from tiny_model import batches, read_text, tiny_model

from moduleformer_ext.surgery import compare, count_usage, plan_by_threshold, prune


def main() -> None:
    model, data = tiny_model()
    usage = count_usage(model, batches(data.train["code"], 12))
    pruned = prune(model, plan_by_threshold(model.config, usage, 0.3))
    print(compare(model, learn(pruned, read_text("csrc", data))).summary())


if __name__ == "__main__":
    main()
