"""Two models learned different texts from the same base; one model with the experts of both.

    python examples/merge.py

As a command: moduleformer-ext merge runs/cpp runs/tests runs/examples/both
"""

from extend import learn
from tiny_model import FOLDER, bits_per_byte, read_text, tiny_model

from moduleformer_ext.surgery import compare, merge


def main() -> None:
    model, data = tiny_model()
    texts = {"C++": read_text("csrc", data), "tests": read_text("tests", data)}
    extensions = {name: learn(model, text, seed=seed) for seed, (name, text) in enumerate(texts.items())}
    both = merge(*extensions.values())
    print(compare(model, both).summary())
    for name, text in {"C++": read_text("include", data), "tests": read_text("tests/nn", data)}.items():
        single = bits_per_byte(extensions[name], text)
        print(f"{name}: {bits_per_byte(model, text):.3f} -> {single:.3f} alone, {bits_per_byte(both, text):.3f} merged")
    both.save_pretrained(FOLDER / "both")


if __name__ == "__main__":
    main()
