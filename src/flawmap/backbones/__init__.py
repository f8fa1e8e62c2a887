"""Pretrained feature extractors by timm name, and how networks get into an engine."""

from flawmap.backbones.catalogue import CATALOGUE, DEFAULT_BACKBONE
from flawmap.backbones.networks import default_deep_levels, default_levels, level_names, levels_at, summaries
from flawmap.backbones.tracing import create_engine, moved
from flawmap.backbones.trunk import Backbone, create_backbone
from flawmap.backbones.weights import save_weights, weights_digest

__all__ = [
    "CATALOGUE",
    "DEFAULT_BACKBONE",
    "Backbone",
    "create_backbone",
    "create_engine",
    "default_deep_levels",
    "default_levels",
    "level_names",
    "levels_at",
    "moved",
    "save_weights",
    "summaries",
    "weights_digest",
]
