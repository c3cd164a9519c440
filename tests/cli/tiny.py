"""The smallest run."""

TINY = ["n_embd=16", "n_layer=2", "att_hidden=16", "ffd_hidden=16", "gating_size=8"]
FLAGS = [
    *[
        "--preset",
        "molm-nano",
        "--vocab-size",
        "270",
        "--batch-size",
        "2",
        "--segment-length",
        "12",
        "--history-length",
        "20",
    ],
    *["--steps", "4", "--dtype", "fp32", "--checkpoint-every", "2", "--held-out", "0.3"],
]
