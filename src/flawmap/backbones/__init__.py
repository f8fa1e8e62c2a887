"""Pretrained feature extractors by timm name, and the engines that run them."""

from flawmap.backbones.catalogue import CATALOGUE, DEFAULT_BACKBONE
from flawmap.backbones.engines import ENGINES, Engine, check_engine, create_engine
from flawmap.backbones.networks import default_deep_levels, default_levels, level_names, levels_at, summaries
from flawmap.backbones.trunk import Backbone, create_backbone
from flawmap.backbones.weights import weights_digest

__all__ = [
    "CATALOGUE",
    "DEFAULT_BACKBONE",
    "ENGINES",
    "Backbone",
    "Engine",
    "check_engine",
    "create_backbone",
    "create_engine",
    "default_deep_levels",
    "default_levels",
    "level_names",
    "levels_at",
    "summaries",
    "weights_digest",
]
