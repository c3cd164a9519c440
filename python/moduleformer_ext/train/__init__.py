"""Training: configuration, the loop with bit-exact resumption, held-out evaluation."""

from moduleformer_ext.train.config import TrainConfig
from moduleformer_ext.train.evaluation import Score, evaluate, overall_bits_per_byte
from moduleformer_ext.train.run_directory import RunDirectory, check_outside, is_run, run_around
from moduleformer_ext.train.session import run_session
from moduleformer_ext.train.sizing import Choice, Size, choose_size
from moduleformer_ext.train.trainer import Trainer

__all__ = [
    "Choice",
    "RunDirectory",
    "Score",
    "Size",
    "TrainConfig",
    "Trainer",
    "check_outside",
    "choose_size",
    "evaluate",
    "is_run",
    "overall_bits_per_byte",
    "run_around",
    "run_session",
]
