"""Layers: routers, mixtures of feed-forward experts and of attention heads, and the block made of them."""

from moduleformer_ext.nn.attention import MixtureOfAttention, RoutedProjection
from moduleformer_ext.nn.block import Block, BlockRoutes
from moduleformer_ext.nn.cache import LayerCache
from moduleformer_ext.nn.experts import ExpertLinear, MixtureOfFFN
from moduleformer_ext.nn.linear import Linear
from moduleformer_ext.nn.router import GMMRouter, LinearRouter, MLPRouter, Router, make_router

__all__ = [
    "Block",
    "BlockRoutes",
    "ExpertLinear",
    "GMMRouter",
    "LayerCache",
    "Linear",
    "LinearRouter",
    "MLPRouter",
    "MixtureOfAttention",
    "MixtureOfFFN",
    "RoutedProjection",
    "Router",
    "make_router",
]
