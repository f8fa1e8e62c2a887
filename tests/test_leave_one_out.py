"""Leaving groups of images out in closed form, against the same computed without them."""

import numpy as np
import pytest
import torch

from feature_maps import LEVELS, SIZE, drawn_features, small_trunk
from flawmap.methods import configure, method_class
from flawmap.methods.blocks.pooled_gaussians import _shrinkage
from flawmap.methods.blocks.position_gaussians import downdated, triangular_inverse

GROUPS = [0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]


@pytest.fixture(scope="module")
def trunk():
    return small_trunk()


def learnt(name, features, trunk, groups=None, inside=None, **settings):
    cls = method_class(name)
    method = cls(cls.resolved(configure(cls, {"levels": LEVELS, **settings}), trunk.name), trunk, SIZE)
    method.groups = None if groups is None else torch.tensor(groups)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for stage in method.stages(len(features[0])):
            for part in torch.arange(len(features[0])).split(7):
                stage.update([level[part] for level in features], None if inside is None else inside[part])
            stage.close(lambda done, total: None)
    return method.eval().requires_grad_(False)


def without(features, members):
    kept = [i for i in range(len(features[0])) if i not in members]
    return [level[kept] for level in features]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_padim_without_a_group_is_a_fit_without_it(trunk, covariance, masked):
    features, n = drawn_features(20), 20
    inside = torch.ones(n, 1, *SIZE)
    if masked:
        inside[::3, :, :, :32] = 0  # some images do not count there
    told = inside if masked else None
    settings = {"channels": 8, "covariance": covariance}
    method = learnt("padim", features, trunk, inside=told, epsilon=1e-4, **settings)
    maps, _ = method.leave_one_out(features, told, torch.tensor(GROUPS))
    for members in ([0], [1, 2], [4, 5, 6]):
        refit = learnt(
            "padim",
            without(features, members),
            trunk,
            inside=None if told is None else inside[[i for i in range(n) if i not in members]],
            epsilon=1e-4 * (n - 1) / (n - 1 - len(members)),
            **settings,
        )
        expected = refit.score([level[members] for level in features])[0]
        for image, found, wanted in zip(members, maps[members], expected, strict=True):
            counted = inside[image : image + 1, :, ::4, ::4] > 0
            torch.testing.assert_close(found[counted[0]], wanted[counted[0]], rtol=3e-3, atol=1e-3)


def test_a_downdate_holds_for_a_share_of_the_covariance():
    random = np.random.default_rng(0)
    n, share = 12, 0.6
    x = random.standard_normal((n, 5))
    rest = np.diag(random.uniform(0.5, 1.5, 5))  # R
    covariance = share * np.cov(x, rowvar=False) + rest
    whitening = np.linalg.inv(np.linalg.cholesky(covariance))
    for members in ([3], [0, 7], [1, 2, 3, 4]):
        y = (x[members] - x.mean(0)) @ whitening.T
        found = downdated(
            torch.tensor(y)[None].float(),
            torch.ones(1, len(members)),
            torch.tensor([float(n)]),
            torch.tensor([share]),
        )[0]
        others = np.delete(x, members, 0)
        grown = (n - 1) / (n - 1 - len(members))
        inverse = np.linalg.inv(share * np.cov(others, rowvar=False) + grown * rest)
        deviations = x[members] - others.mean(0)
        np.testing.assert_allclose(found, np.einsum("ic,cd,id->i", deviations, inverse, deviations), rtol=1e-4)


def test_the_inverse_of_a_triangle():
    factors = torch.randn(3, 6, 6, dtype=torch.float64).tril() + 4 * torch.eye(6)
    for kind in (torch.float64, torch.float32):
        inverse = triangular_inverse(factors.to(kind))
        assert inverse.dtype == kind
        torch.testing.assert_close(inverse.double(), torch.linalg.inv(factors), rtol=1e-4, atol=1e-6)


def test_a_group_is_left_out_of_the_bank_and_what_greedy_would_pick_instead_comes_in(trunk):
    features = drawn_features(20)
    settings = {"min_vectors": 150, "components": 0, "deep_levels": ()}
    method = learnt("patchcore", features, trunk, GROUPS, **settings)
    bank = method.bank
    patches = bank.patches(features)  # (B, T, C)
    owners = torch.tensor(GROUPS).repeat_interleave(patches.shape[1])
    flat, vectors = patches.flatten(0, 1), bank.index[:, :-1]
    _, origin = torch.cdist(vectors.double(), flat.double()).min(1)
    assert torch.equal(bank.owners, owners[origin])
    left_out = bank.left_out(features, torch.tensor(GROUPS))
    radius = torch.cdist(flat.double(), vectors.double()).amin(1).max()
    assert bank.stand_ins  # or nothing of this is tested
    for group in (1, 3):
        others = flat[owners != group]
        kept = vectors[bank.owners != group]
        added = bank.stand_ins.get(group, kept[:0])
        assert len(added) <= int((bank.owners == group).sum())
        if len(added):
            assert float(torch.cdist(added.double(), others.double()).amin(1).max()) < 1e-4  # they are others' patches
            assert float(torch.cdist(added[:1].double(), kept.double()).min()) > radius
        members = (torch.tensor(GROUPS) == group).nonzero()[:, 0]
        expected = torch.cdist(patches[members], torch.cat([kept, added])).amin(2)
        torch.testing.assert_close(left_out[members].flatten(1), expected, rtol=1e-3, atol=1e-3)


def test_a_bank_of_which_one_group_is_all_has_nothing_to_leave_out(trunk):
    features = drawn_features(3)
    method = learnt("patchcore", features, trunk, [0, 0, 0], deep_levels=())
    assert method.leave_one_out(features, None, torch.tensor([0, 0, 0])) is None
    assert learnt("patchcore", features, trunk).leave_one_out(features, None, torch.arange(3)) is None  # not told whose


def test_patchcore_left_out_scores_lie_about_those_of_refits(trunk):
    """Neither as high as those of a bank with holes, nor as low as those of one that knows the image."""
    features, groups = drawn_features(12), list(range(12))
    settings = {"min_vectors": 250, "deep_levels": ()}
    method = learnt("patchcore", features, trunk, groups, **settings)
    _, found = method.leave_one_out(features, None, torch.arange(12))
    refits = [learnt("patchcore", without(features, [i]), trunk, **settings) for i in range(12)]
    wanted = torch.cat([refits[i].score([level[i : i + 1] for level in features])[1] for i in range(12)])
    known = method.score(features)[1]
    assert float(found.mean()) == pytest.approx(float(wanted.mean()), rel=0.03)
    assert float(known.mean()) < 0.95 * float(wanted.mean())


def test_gaussbank_is_the_mahalanobis_distance_to_shrunk_covariances(trunk):
    features = drawn_features(30)
    method = learnt("gaussbank", features, trunk, channels=64, bank_share=0, level="none")
    gaussians = method.gaussians
    maps = [torch.nn.functional.interpolate(f.double(), size=(8, 8), mode="bilinear") for f in features]
    x = torch.cat(maps, 1).flatten(2).permute(2, 0, 1).numpy()  # (P, N, D)
    deviations = x - x.mean(1, keepdims=True)
    pooled = np.einsum("pnc,pnd->cd", deviations, deviations) / (len(x) * 29)
    pooled += 0.01 * np.diag(np.diag(pooled))
    new = drawn_features(1, seed=4)
    y = torch.cat([torch.nn.functional.interpolate(f.double(), size=(8, 8), mode="bilinear") for f in new], 1)
    y = y.flatten(2)[0].T.numpy()
    found = (method.score(new)[0] * method.spreads[0]).flatten().numpy()
    for position in range(0, 64, 13):
        shrinkage = 1 - float(gaussians.share[position])
        covariance = (1 - shrinkage) * np.cov(x[position], rowvar=False) + shrinkage * pooled
        away = y[position] - x[position].mean(0)
        wanted = np.sqrt(away @ np.linalg.inv(covariance) @ away / 64)
        assert found[position] == pytest.approx(wanted, rel=2e-3)


def test_shrinkage_is_ledoit_and_wolfs():
    random = np.random.default_rng(1)
    z = random.standard_normal((40, 6)) * np.linspace(0.5, 2, 6)
    z -= z.mean(0)
    sample = z.T @ z / 40
    noise = sum(np.square(np.outer(v, v) - sample).sum() for v in z) / 40**2
    unbiased = z.T @ z / 39
    wanted = noise / np.square(unbiased - np.eye(6)).sum()
    told = (
        torch.tensor(unbiased)[None],
        torch.tensor([40.0]).double(),
        torch.tensor([np.square(np.square(z).sum(1)).sum()]),
    )
    assert 0.05 < wanted < 0.95
    assert float(_shrinkage(*told)) == pytest.approx(wanted, rel=1e-6)
    # Of vectors that are alike there is no noise, and yet few of them tell nothing.
    assert float(_shrinkage(torch.zeros(1, 6, 6).double(), torch.tensor([4.0]).double(), torch.zeros(1))) == 0.5


def test_gaussbank_left_out_scores_lie_about_those_of_refits(trunk):
    features, groups = drawn_features(24), list(range(24))
    settings = {"channels": 32, "bank_share": 0, "level": "none"}
    method = learnt("gaussbank", features, trunk, groups, **settings)
    found, _ = method.leave_one_out(features, None, torch.arange(24))
    chosen = [0, 9, 23]
    refits = [learnt("gaussbank", without(features, [i]), trunk, **settings) for i in chosen]
    wanted = torch.cat(
        [refit.score([f[i : i + 1] for f in features])[0] for i, refit in zip(chosen, refits, strict=True)]
    )
    known = method.score([f[chosen] for f in features])[0]
    assert float((found[chosen] / wanted).mean()) == pytest.approx(1, abs=0.05)
    assert float((known / wanted).mean()) < 0.9


@pytest.mark.parametrize("masked", [False, True])
def test_gaussbanks_parts_have_the_spread_of_images_left_out(trunk, masked):
    """One alone would otherwise outshout the others, by as much as its distances happen to be larger."""
    features, groups, inside = drawn_features(24), torch.arange(24), None
    if masked:
        inside = torch.ones(24, 1, *SIZE)
        inside[:, :, :, : SIZE[1] // 2] = 0
    method = learnt("gaussbank", features, trunk, channels=32, level="none", deep_levels=LEVELS[-1:], inside=inside)
    assert len(set(method.spreads.tolist())) == 3
    for distances, spread in zip(method._left_out(features, inside, groups), method.spreads, strict=True):
        held = distances if inside is None else distances[:, :, distances.shape[-1] // 2 :]
        assert float(held.double().std(correction=0)) == pytest.approx(float(spread), rel=1e-5)


def test_gaussbank_of_two_images_has_units_of_the_usual_size(trunk):
    method = learnt("gaussbank", drawn_features(2), trunk, channels=8, deep_levels=LEVELS[-1:])
    assert method.spreads.tolist() == [1, float(method.bank.unit), float(method.deep_bank.unit)]


def test_groups_take_their_near_duplicates_with_them(trunk):
    """A twin left in would make an image look as good as learnt."""
    features = drawn_features(16)
    features = [torch.cat([level, level[:1] + 0.001]) for level in features]
    alone, together = list(range(17)), [*range(16), 0]
    for name in ("patchcore", "padim", "gaussbank"):
        scores = []
        for groups in (alone, together):
            told = {"min_vectors": 300} if name != "padim" else {"channels": 8}
            method = learnt(name, features, trunk, groups, **told)
            scores.append(float(method.leave_one_out(features, None, torch.tensor(groups))[1][0]))
        assert scores[0] < 0.9 * scores[1], name
