"""What is known of each method without importing it: where its class is, its paper, and when to take it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from flawmap.errors import FlawmapError
from flawmap.methods.contract import Method


@dataclass(frozen=True)
class Entry:
    """One method: where its class is, the paper it follows, and when to take it, in one clause."""

    name: str
    location: str
    paper: str
    when: str

    def load(self) -> type[Method]:
        """Raises FlawmapError where a method that is not of this package cannot be had."""
        module, _, attribute = self.location.partition(":")
        try:
            method = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if self.name in METHODS:
                raise
            raise FlawmapError(
                f"method {self.name} {self.paper} cannot be imported ({error}): install it anew"
            ) from error
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise FlawmapError(f"method {self.name} {self.paper} is no subclass of flawmap.methods.Method: mend it")
        return method


METHODS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "cainnflow",
            "flawmap.methods.cainnflow:CAINNFlow",
            "Yan et al., arXiv 2206.01992",
            "hundreds of good images: of the flows the quickest, and the first in image AUROC on tiles",
        ),
        Entry(
            "cfa",
            "flawmap.methods.cfa:CFA",
            "Lee et al., IEEE Access 2022",
            "a small model: a tenth of the numbers of patchcore's bank; behind it in image AUROC on tiles",
        ),
        Entry(
            "cflow",
            "flawmap.methods.cflow:CFlow",
            "Gudovskiy et al., WACV 2022",
            "hundreds of good images: finds regions on tiles as well as cainnflow, at four times its training",
        ),
        Entry(
            "cls_cnf",
            "flawmap.methods.cls_cnf:ClsCnf",
            "Oh & Kim, IEEE Access 2024",
            "marking regions: the best AUPRO and pixel AP on tiles, at the longest training",
        ),
        Entry(
            "differnet",
            "flawmap.methods.differnet:DifferNet",
            "Rudolph et al., WACV 2021",
            "verdicts on whole images, where no map is needed",
        ),
        Entry(
            "draem",
            "flawmap.methods.draem:DRAEM",
            "Zavrtanik et al., ICCV 2021",
            "nothing pretrained may be used, and photographs of textures are at hand",
        ),
        Entry(
            "f2r",
            "flawmap.methods.f2r:F2R",
            "Zhu et al., IEEE Access 2023",
            "to move the weight of what is there and where it is after training",
        ),
        Entry(
            "gaussbank",
            "flawmap.methods.gaussbank:Gaussbank",
            "of PaDiM's and PatchCore's parts",
            "the default: the best mean of image AUROC and AUPRO over the sets measured",
        ),
        Entry(
            "padim",
            "flawmap.methods.padim:PaDiM",
            "Defard et al., ICPR 2021",
            "parts that all lie alike: quick to learn, best on boards; not for parts in any pose",
        ),
        Entry(
            "patchcore",
            "flawmap.methods.patchcore:PatchCore",
            "Roth et al., CVPR 2022",
            "windows of large images (--tile); on parts in any pose about level with gaussbank",
        ),
        Entry(
            "pouta",
            "flawmap.methods.pouta:POUTA",
            "Wang et al., TCSVT 2024",
            "nothing pretrained may be used: sharp outlines, ahead of draem in image AUROC, minutes to train",
        ),
    )
}
