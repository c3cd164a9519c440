"""Layers: routers, mixtures of feed-forward experts and of attention heads, and the block made of them."""

from moduleformer_ext.nn.attention import MixtureOfAttention, RoutedProjection
from moduleformer_ext.nn.block import Block, BlockRoutes
from moduleformer_ext.nn.cache import LayerCache, StaticLayerCache
from moduleformer_ext.nn.experts import ExpertLinear, MixtureOfFFN
from moduleformer_ext.nn.linear import Linear, head_cross_entropy
from moduleformer_ext.nn.modes import EvaluationMode
from moduleformer_ext.nn.quantised import QuantisedExpertLinear
from moduleformer_ext.nn.router import GMMRouter, LinearRouter, MLPRouter, Router, make_router

__all__ = [
    "Block",
    "BlockRoutes",
    "EvaluationMode",
    "ExpertLinear",
    "GMMRouter",
    "LayerCache",
    "Linear",
    "LinearRouter",
    "MLPRouter",
    "MixtureOfAttention",
    "MixtureOfFFN",
    "QuantisedExpertLinear",
    "RoutedProjection",
    "Router",
    "StaticLayerCache",
    "head_cross_entropy",
    "make_router",
]
