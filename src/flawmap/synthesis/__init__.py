"""Synthetic defects: masks, foregrounds, sources, blends and soft labels, as functions of arrays and a generator."""

from flawmap.synthesis.defects import (
    CLS_CNF,
    DEFAULTS,
    DRAEM,
    DRAEM_TEXT,
    KINDS,
    POUTA,
    Defect,
    SynthesisSettings,
    generator,
    synthesize,
)
from flawmap.synthesis.foreground import Foreground, find_foreground, looked_at
from flawmap.synthesis.labels import soft_label
from flawmap.synthesis.sources import GoodImages, TextureFolder
from flawmap.synthesis.textures import draw_texture

__all__ = [
    "CLS_CNF",
    "DEFAULTS",
    "DRAEM",
    "DRAEM_TEXT",
    "KINDS",
    "POUTA",
    "Defect",
    "Foreground",
    "GoodImages",
    "SynthesisSettings",
    "TextureFolder",
    "draw_texture",
    "find_foreground",
    "generator",
    "looked_at",
    "soft_label",
    "synthesize",
]
