"""One file per paper, each reading like it, behind one contract and one registry."""

from flawmap.methods.catalogue import METHODS
from flawmap.methods.contract import Collect, Config, Method, Optimise, Stage, SyntheticDefects
from flawmap.methods.plugins import known_methods
from flawmap.methods.presets import Preset
from flawmap.methods.registry import automatic, configure, method_class, preset_of

__all__ = [
    "METHODS",
    "Collect",
    "Config",
    "Method",
    "Optimise",
    "Preset",
    "Stage",
    "SyntheticDefects",
    "automatic",
    "configure",
    "known_methods",
    "method_class",
    "preset_of",
]
