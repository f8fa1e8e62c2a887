"""What a stage of synthetic defects is given, drawn: good inputs, copies with a defect, masks."""

import torch


def batch(count=2, side=64):
    random = torch.Generator().manual_seed(1)
    good = torch.randn(count, 3, side, side, generator=random)
    masks = torch.zeros(count, 1, side, side)
    masks[:, :, 10:30, 20:50] = 1
    return [good, torch.where(masks > 0, torch.randn(good.shape, generator=random), good), masks]
