"""Invertible blocks with known log-determinants, and the subnets inside them."""

from flawmap.flows.blocks import ActNorm, Block, Flow, Mixing, MixingKind
from flawmap.flows.coupling import Clamp, Coupling, Subnet
from flawmap.flows.glow import Glow
from flawmap.flows.subnets import CBAM, Separate, convolutions, mlp, position_code

__all__ = [
    "CBAM",
    "ActNorm",
    "Block",
    "Clamp",
    "Coupling",
    "Flow",
    "Glow",
    "Mixing",
    "MixingKind",
    "Separate",
    "Subnet",
    "convolutions",
    "mlp",
    "position_code",
]
