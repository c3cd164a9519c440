"""What ModuleFormer does to modules: count their use, prune them, insert new ones, freeze, compare, merge."""

from moduleformer_ext.surgery.anatomy import KINDS, Site, count_parameters, sites
from moduleformer_ext.surgery.compare import Comparison, compare
from moduleformer_ext.surgery.freeze import PARTS, set_trainable
from moduleformer_ext.surgery.insert import INITS, insert_experts
from moduleformer_ext.surgery.merge import merge
from moduleformer_ext.surgery.penalty import PENALTIES, routing_penalty
from moduleformer_ext.surgery.prune import PruningPlan, plan_by_size, plan_by_threshold, prune
from moduleformer_ext.surgery.usage import (
    NORMALISERS,
    ExpertUsage,
    count_usage,
    divergences,
    kl_divergence,
    usage_table,
)
from moduleformer_ext.surgery.usage_plot import plot_expert_usage

__all__ = [
    "INITS",
    "KINDS",
    "NORMALISERS",
    "PARTS",
    "PENALTIES",
    "Comparison",
    "ExpertUsage",
    "PruningPlan",
    "Site",
    "compare",
    "count_parameters",
    "count_usage",
    "divergences",
    "insert_experts",
    "kl_divergence",
    "merge",
    "plan_by_size",
    "plan_by_threshold",
    "plot_expert_usage",
    "prune",
    "routing_penalty",
    "set_trainable",
    "sites",
    "usage_table",
]
