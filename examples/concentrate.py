"""Fine-tune with the concentration loss: the load gathers on few experts, and the others can go.

    python examples/concentrate.py

As commands:
    moduleformer-ext finetune runs/examples/base --run runs/examples/few --concentrate 0.2 --steps 40
    moduleformer-ext prune runs/examples/few runs/examples/fewer --remaining 0.5
"""

import shutil

from tiny_model import BASE, FOLDER, batches, bits_per_byte, tiny_model

from moduleformer_ext.cli import main as command
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import count_usage, plan_by_size, prune
from moduleformer_ext.train import RunDirectory


def main() -> None:
    model, data = tiny_model()
    code, held_out = data.train["code"], data.held_out["code"]
    for weight in ("0", "0.2"):
        root = FOLDER / f"concentrated-{weight}"
        shutil.rmtree(root, ignore_errors=True)
        command(
            ["finetune", str(BASE), "--run", str(root), "--concentrate", weight, "--steps", "40", "--dtype", "fp32"]
        )
        model = MoLMForCausalLM.from_pretrained(RunDirectory.open(root).checkpoints.latest())
        small = prune(model, plan_by_size(model.config, count_usage(model, batches(code, 12)), remaining=0.5))
        before, after = bits_per_byte(model, held_out), bits_per_byte(small, held_out)
        print(f"concentrated with weight {weight}: {before:.3f} bits per byte, {after:.3f} with half of the parameters")


if __name__ == "__main__":
    main()
