"""Training: configuration, the loop with bit-exact resumption, held-out evaluation, expert usage."""

from moduleformer_ext.train.config import TrainConfig
from moduleformer_ext.train.evaluation import Score, evaluate, overall_bits_per_byte
from moduleformer_ext.train.run_directory import RunDirectory, is_run
from moduleformer_ext.train.session import run_session
from moduleformer_ext.train.trainer import Trainer
from moduleformer_ext.train.usage import ExpertUsage, kl_divergence
from moduleformer_ext.train.usage_plot import plot_expert_usage

__all__ = [
    "ExpertUsage",
    "RunDirectory",
    "Score",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "is_run",
    "kl_divergence",
    "overall_bits_per_byte",
    "plot_expert_usage",
    "run_session",
]
