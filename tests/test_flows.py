"""Blocks and stacks: inverses, log-determinants, starts, subnets; parity with FrEIA and timm."""

import copy
import math
from functools import cache, partial

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.cbam import CbamModule
from torch import nn

from flawmap.flows import CBAM, ActNorm, Coupling, Flow, Mixing, Separate, convolutions, mlp, position_code

CLAMPS = ["tanh", "tenth", "atan", "sigmoid", "none"]
SUBNETS = {  # name: the subnet, and whether it reads maps
    "mlp": (mlp(8, layers=3), False),
    "relative mlp": (mlp(2.0), False),
    "separate mlps": (partial(Separate, mlp(8)), False),
    "3x3 3x3": (convolutions(), True),
    "3x3 3x3 linear": (convolutions(ratio=1.5, activation=False), True),
    "CBAM between": (convolutions("CAC", reduction=2), True),
    "CBAM before": (convolutions("AC", reduction=2), True),
    "CBAM behind": (convolutions("CA", reduction=2), True),
    "separate convolutions": (partial(Separate, convolutions()), True),
}
ALONE = {  # act on each position alone: on vectors as well as on maps
    "actnorm": ActNorm,
    "actnorm softplus": partial(ActNorm, scale="softplus"),
    "actnorm identity": partial(ActNorm, start="identity"),
    "actnorm identity softplus": partial(ActNorm, start="identity", scale="softplus"),
    **{kind: partial(Mixing, kind=kind) for kind in ("plain", "lu", "orthogonal", "permutation")},
}


def glow(c, k, mixing="plain", steps=3):
    subnet = mlp(12, layers=3)
    return Flow(
        block
        for _ in range(steps)
        for block in (ActNorm(c), Mixing(c, mixing), Coupling(c, subnet, condition=k, clamp="tanh"))
    )


def all_in_one(c, k, steps=3):
    return Flow(
        block
        for _ in range(steps)
        for block in (
            Coupling(c, mlp(2.0, zero=False), condition=k, clamp="tenth"),
            ActNorm(c, start="identity", scale="softplus"),
            Mixing(c, "orthogonal"),
        )
    )


def differnet(c, k, steps=3):
    return Flow(
        block
        for _ in range(steps)
        for block in (
            Mixing(c, "permutation"),
            Coupling(c, mlp(12, layers=3), condition=k, two_sided=True, clamp="atan", bound=3.0),
        )
    )


def fastflow(c, k, steps=4):
    return Flow(
        block
        for i in range(steps)
        for block in (
            Mixing(c, "permutation"),
            Coupling(c, convolutions(side=1 if i % 2 else 3), condition=k, clamp="tanh"),
            ActNorm(c, start="identity"),
        )
    )


def attentive(c, k, steps=2):
    subnet = convolutions("CAC", reduction=2)
    return Flow(
        block
        for _ in range(steps)
        for block in (ActNorm(c), Mixing(c, "permutation"), Coupling(c, subnet, condition=k, two_sided=True))
    )


# name: (maker of channels and condition, maps, channels, condition)
BLOCKS = {
    **{f"{name} {shape}": (lambda c, k, make=make: make(c), shape == "maps", 5, 0)
       for name, make in ALONE.items() for shape in ("vectors", "maps") if shape == "vectors" or "actnorm" not in name},
    "actnorm maps": (lambda c, k: ActNorm(c), True, 5, 0),
    **{f"coupling {clamp}": (lambda c, k, clamp=clamp: Coupling(c, mlp(8), condition=k, clamp=clamp), False, 5, 3)
       for clamp in CLAMPS},
    **{f"coupling {name}": (
        lambda c, k, subnet=subnet, clamp=CLAMPS[i % 5]: Coupling(c, subnet, condition=k, two_sided=True, clamp=clamp),
        maps, 6, 2 * i % 3)
       for i, (name, (subnet, maps)) in enumerate(SUBNETS.items())},
}  # fmt: skip
STACKS = {
    "glow": (glow, False, 6, 0),
    "glow lu": (partial(glow, mixing="lu"), False, 5, 2),
    "all in one": (all_in_one, False, 6, 4),
    "differnet": (differnet, False, 7, 0),
    "fastflow": (fastflow, True, 6, 0),
    "attentive": (attentive, True, 5, 2),
}
EVERY = {**BLOCKS, **STACKS}


traced = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:You are using the legacy")


@pytest.fixture(autouse=True)
def double():
    """Float64 throughout, so that fixed rotations are orthogonal to its precision; one thread, the same draws."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def toy(name, seed=0, n=None):
    """Correlated, heavy-tailed inputs that depend on their condition; channels of other units."""
    _, maps, c, k = EVERY[name]
    generator = torch.Generator().manual_seed(seed)
    shape = (n or (4 if maps else 64), 4, 4) if maps else (n or 64,)
    noise = torch.randn(*shape, c, generator=generator) * torch.rand(*shape, 1, generator=generator).add(0.1).rsqrt()
    mixed = torch.Generator().manual_seed(1)
    x = noise @ torch.randn(c, c, generator=mixed) * torch.logspace(-1, 1, c) + 3 * torch.randn(c, generator=mixed)
    if not k:
        return x.movedim(-1, 1).contiguous(), None
    condition = torch.randn(*shape, k, generator=generator)
    x = x + condition @ torch.randn(k, c, generator=mixed)
    return x.movedim(-1, 1).contiguous(), condition.movedim(-1, 1).contiguous()


def nll(block, x, condition):
    z, log_det = block(x, condition)
    return (0.5 * z.flatten(1).square().sum(1) - log_det).mean()


@cache
def at_start(name):
    """The block after its first training forward."""
    make, _, c, k = EVERY[name]
    torch.manual_seed(0)
    block = make(c, k)
    block(*toy(name))
    return block.eval()


@cache
def trained(name):
    """After 200 steps; the digits of float64 are those of the parameters too."""
    block = copy.deepcopy(at_start(name)).train()
    parameters = list(block.parameters())
    if parameters:
        optimiser = torch.optim.Adam(parameters, lr=2e-3, fused=True)
        for step in range(200):
            loss = nll(block, *toy(name, step))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return block.eval()


def randomised(block):
    """No output stays zero, no two channels alike."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    for part in block.modules():
        if isinstance(part, ActNorm):
            part.initialised.fill_(True)
    return block.eval()


def relative(found, expected):
    """The largest error of a sample over its length."""
    return float(((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().detach())


def jacobians(block, x, condition):
    """log |det dz/dx| of each sample by automatic differentiation."""
    logs = []
    for i in range(len(x)):
        beside = None if condition is None else condition[i : i + 1]
        matrix = torch.autograd.functional.jacobian(
            lambda one, beside=beside: block(one, beside)[0], x[i : i + 1], vectorize=True
        ).reshape(x[i].numel(), -1)
        logs.append(torch.linalg.slogdet(matrix).logabsdet)
    return torch.stack(logs)


@pytest.mark.parametrize("state", [at_start, trained], ids=["start", "trained"])
@pytest.mark.parametrize("name", EVERY)
def test_inverse(name, state):
    """Of data in both precisions; of draws from the prior, which may be far from all data, in float64."""
    for dtype, limit in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        block = copy.deepcopy(state(name)).to(dtype)
        x, condition = toy(name, seed=500)
        x, condition = x.to(dtype), None if condition is None else condition.to(dtype)
        with torch.no_grad():
            z, log_det = block(x, condition)
            assert relative(block.inverse(z, condition), x) < limit
            assert log_det.shape == (len(x),)
            assert log_det.dtype == dtype
            drawn = torch.randn_like(x)
            if dtype == torch.float64:
                assert relative(block(block.inverse(drawn, condition), condition)[0], drawn) < limit


@pytest.mark.parametrize("state", [at_start, trained], ids=["start", "trained"])
@pytest.mark.parametrize("name", EVERY)
def test_log_determinant(name, state):
    x, condition = toy(name, seed=500, n=2)
    log_det = state(name)(x, condition)[1]
    torch.testing.assert_close(log_det, jacobians(state(name), x, condition), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", STACKS)
def test_training_lowers_the_loss(name):
    x, condition = toy(name, seed=500)
    with torch.no_grad():
        assert nll(trained(name), x, condition) < nll(at_start(name), x, condition) - 0.5


@pytest.mark.parametrize(("channels", "condition"), [(4, 0), (5, 3)])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("subnet", SUBNETS)
def test_coupling_with_any_subnet(subnet, clamp, two_sided, channels, condition):
    """Away from the zero start, where a wrong log-determinant or order of halves would not show."""
    make, maps = SUBNETS[subnet]
    block = randomised(Coupling(channels, make, condition=condition, two_sided=two_sided, clamp=clamp))
    shape = (3, 2) if maps else ()
    x = torch.randn(1, channels, *shape)
    beside = torch.randn(1, condition, *shape) if condition else None
    z, log_det = block(x, beside)
    torch.testing.assert_close(log_det, jacobians(block, x, beside), rtol=1e-8, atol=1e-8)
    assert float(log_det.detach().abs()) > 1e-3
    assert relative(block.inverse(z, beside), x) < 1e-8
    changed = (z != x).reshape(channels, -1).any(1)
    assert changed.tolist() == [two_sided] * (channels - channels // 2) + [True] * (channels // 2)


@pytest.mark.parametrize(
    ("clamp", "log_scale", "shift"),
    [
        ("tanh", lambda a: 1.9 * math.tanh(a / 1.9), 1.0),
        ("tenth", lambda a: 1.9 * math.tanh(a / 10), 0.1),
        ("atan", lambda a: 1.9 * 0.636 * math.atan(a / 1.9), 1.0),
        ("sigmoid", lambda a: -math.log1p(math.exp(-a - 2)), 1.0),
        ("none", lambda a: a, 1.0),
    ],
)
@given(st.floats(-9, 9), st.floats(-9, 9))
@settings(max_examples=20, deadline=None)
def test_clamps(clamp, log_scale, shift, a, b):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[a, b]])

    block = Coupling(2, lambda inputs, outputs: Constant(), clamp=clamp, bound=1.9)
    z, log_det = block(torch.tensor([[7.0, 3.0]]))
    expected = [7.0, 3 * math.exp(log_scale(a)) + shift * b]
    np.testing.assert_allclose(z[0], expected, rtol=1e-9)
    assert float(log_det) == pytest.approx(log_scale(a), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("subnet", SUBNETS)
def test_zero_start_is_the_identity(subnet, two_sided):
    make, maps = SUBNETS[subnet]
    x = torch.randn(3, 6, *((4, 5) if maps else ()))
    z, log_det = Coupling(6, make, two_sided=two_sided)(x)
    torch.testing.assert_close(z, x, rtol=0, atol=0)
    assert not log_det.detach().any()


def test_starts_that_are_not_zero():
    assert Coupling(6, mlp(8, zero=False))(torch.randn(3, 6))[1].detach().abs().min() > 1e-4
    assert Coupling(6, convolutions(zero=False))(torch.randn(3, 6, 4, 4))[1].detach().abs().min() > 1e-4


def shapes(subnet):
    return [tuple(parameter.shape) for parameter in subnet.parameters()]


def test_subnet_shapes():
    assert shapes(mlp(7, layers=3)(4, 6)) == [(7, 4), (7,), (7, 7), (7,), (6, 7), (6,)]
    assert shapes(mlp(2.0)(4, 6)) == [(8, 4), (8,), (6, 8), (6,)]
    assert shapes(mlp(7, layers=1)(4, 6)) == [(6, 4), (6,)]
    assert shapes(convolutions(side=1, ratio=0.5)(4, 6)) == [(2, 4, 1, 1), (2,), (6, 2, 1, 1), (6,)]
    cbam = [(2, 32, 1, 1), (32, 2, 1, 1), (1, 2, 7, 7)]
    first, second = [(32, 32, 3, 3), (32,)], [(64, 32, 3, 3), (64,)]
    assert shapes(convolutions("CAC")(32, 64)) == first + cbam + second
    assert shapes(convolutions("AC")(32, 64)) == cbam + second
    behind = [(4, 64, 1, 1), (64, 4, 1, 1), (1, 2, 7, 7)]
    assert shapes(convolutions("CA")(32, 64)) == second + behind
    assert shapes(Separate(mlp(7), 4, 6)) == 2 * [(7, 4), (7,), (3, 7), (3,)]


def test_activation_between_convolutions_can_be_left_out():
    linear = randomised(convolutions(activation=False)(2, 2))
    kinked = randomised(convolutions()(2, 2))
    x, zero = torch.randn(2, 2, 5, 5), torch.zeros(1, 2, 5, 5)
    assert torch.allclose(linear(-x) - linear(zero), linear(zero) - linear(x))
    assert not torch.allclose(kinked(-x) - kinked(zero), kinked(zero) - kinked(x))


@pytest.mark.parametrize("scale", ["exp", "softplus"])
@given(
    st.lists(st.tuples(st.floats(-2, 1), st.floats(-100, 100)), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_actnorm_normalises_its_first_batch(scale, units, maps, seed):
    """Channels of any mean and of any unit, none silent beside the others."""
    generator = torch.Generator().manual_seed(seed)
    exponents, means = torch.tensor(units).T
    stds = 10 ** (exponents - exponents.max() + exponents[0]).clamp(exponents.max() - 1, None)
    shape = (1, -1, 1, 1) if maps else (1, -1)
    x = torch.randn(8, len(units), *((3, 4) if maps else ()), generator=generator)
    x = x * stds.view(shape) + means.view(shape)
    block = ActNorm(len(units), scale=scale)
    z = block(x)[0].detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(len(units)), rtol=0, atol=1e-7)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(len(units)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", ["exp", "softplus"])
@pytest.mark.parametrize("unit", [1e-5, 1e-2, 1.0, 1e2, 1e5])
def test_actnorm_start_in_float32(unit, scale):
    x = unit * torch.randn(64, 4, dtype=torch.float32)
    z, log_det = ActNorm(4, scale=scale).float()(x)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(4, dtype=torch.float32), rtol=1e-4, atol=0)
    assert log_det[0].item() == pytest.approx(-float(x.std(0, correction=0).log().sum()), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("scale", ["exp", "softplus"])
def test_actnorm_does_not_blow_up_silent_channels(scale):
    x = torch.randn(64, 4)
    x[:, 2] = 5.0
    block = ActNorm(4, scale=scale)
    z = block(x)[0]
    assert z[:, 2].abs().max() < 1e-6
    heard = block(x + torch.tensor([0, 0, 0.5, 0]))[0][:, 2]
    limit = 0.5 / (0.01 * x.std(0, correction=0).mean())
    torch.testing.assert_close(heard, limit.expand(64))
    assert torch.isfinite(ActNorm(4, scale=scale)(torch.full((8, 4), 3.0))[0]).all()


def test_actnorm_starts_once_and_in_training_only():
    x = 3 * torch.randn(64, 4) + 1
    block = ActNorm(4).eval()
    torch.testing.assert_close(block(x)[0], x)
    block.train()(x)
    first = copy.deepcopy(block.state_dict())
    block(10 * x)
    loaded = ActNorm(4)
    loaded.load_state_dict(first)
    loaded.train()(10 * x)
    for state in (block.state_dict(), loaded.state_dict()):
        assert all(torch.equal(state[name], first[name]) for name in first)


@pytest.mark.parametrize("scale", ["exp", "softplus"])
def test_actnorm_identity_start(scale):
    x = 3 * torch.randn(8, 5, 2, 2) + 1
    z, log_det = ActNorm(5, start="identity", scale=scale).train()(x)
    torch.testing.assert_close(z, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, torch.zeros(8), rtol=0, atol=1e-12)


@given(st.integers(2, 8), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_lu_is_the_product_of_its_parts(channels, seed):
    torch.manual_seed(seed)
    block = Mixing(channels, "lu")
    start = block.weight().detach()
    torch.testing.assert_close(start @ start.T, torch.eye(channels))
    randomised(block)  # moves the idle triangles of `lower` and `upper` too
    state = {name: value.numpy() for name, value in block.state_dict().items()}
    lower = np.tril(state["lower"], -1) + np.eye(channels)
    upper = np.triu(state["upper"], 1) + np.diag(state["sign"] * np.exp(state["log_diagonal"]))
    expected = state["permutation"] @ lower @ upper
    np.testing.assert_allclose(block.weight().detach(), expected, atol=1e-12)
    x = torch.randn(3, channels)
    z, log_det = block(x)
    np.testing.assert_allclose(z.detach(), x.numpy() @ expected.T, atol=1e-10)
    np.testing.assert_allclose(log_det.detach(), np.linalg.slogdet(expected)[1], atol=1e-10)
    assert block.condition_number() == pytest.approx(np.linalg.cond(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "lu", "orthogonal", "permutation"])
def test_mixing_starts_as_a_rotation(kind):
    block = Mixing(7, kind)
    weight = block.weight().detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(7))
    assert block.condition_number() == pytest.approx(1)
    x = torch.randn(2, 7, 3, 3)
    z, log_det = block(x)
    torch.testing.assert_close(z.detach(), torch.einsum("dc,bchw->bdhw", weight, x))
    torch.testing.assert_close(log_det.detach(), torch.zeros(2), rtol=0, atol=1e-12)
    learns = sum(parameter.numel() for parameter in block.parameters())
    assert learns == {"plain": 49, "lu": 2 * 49 + 7}.get(kind, 0)


def test_permutation_is_exact():
    block = Mixing(9, "permutation")
    x = torch.randn(4, 9)
    z = block(x)[0]
    assert torch.equal(block.inverse(z), x)
    assert torch.equal(z.sort(1).values, x.sort(1).values)
    assert torch.equal(z, x @ block.weight().T)


def test_rotations_are_uniform():
    """Entries of a uniform rotation have mean 0 and variance 1 / C; a QR without Mezzadri's signs has neither."""
    drawn = torch.stack([Mixing(3, "orthogonal").weight() for _ in range(1500)])
    assert drawn.mean(0).abs().max() < 4 * math.sqrt(1 / 3 / 1500)
    assert (drawn.var(0) - 1 / 3).abs().max() < 0.05


def test_condition_number_is_the_largest():
    inner = Flow([Mixing(4, "plain"), ActNorm(4)])
    flow = randomised(Flow([Mixing(4, "lu"), inner, Mixing(4, "orthogonal")]))
    weights = [flow.blocks[0].weight(), inner.blocks[0].weight()]
    assert flow.condition_number() == pytest.approx(max(np.linalg.cond(w.detach().numpy()) for w in weights), rel=1e-6)
    assert Flow([ActNorm(4)]).condition_number() == 1
    for name in ("glow", "glow lu"):
        numbers = [np.linalg.cond(b.weight().detach().numpy()) for b in trained(name).blocks if isinstance(b, Mixing)]
        assert trained(name).condition_number() == pytest.approx(max(numbers), rel=1e-6)
        assert 1.01 < max(numbers) < 1e3


@pytest.mark.parametrize("name", [name for name, (_, maps, _, _) in EVERY.items() if maps])
def test_log_determinant_is_the_sum_over_positions(name):
    x, condition = toy(name, seed=500)
    z, log_det = trained(name)(x, condition)
    same, added = trained(name).at_positions(x, condition)
    assert added.shape == (len(x), 4, 4)
    torch.testing.assert_close(same, z)
    torch.testing.assert_close(added.sum((1, 2)), log_det)


@given(st.integers(2, 7), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_positions_stand_alone_where_kernels_are_one(channels, batch, height, width, seed):
    """What a position adds to the log-determinant is then the log-determinant of its own Jacobian."""
    torch.manual_seed(seed)
    coupling = partial(Coupling, channels, convolutions(side=1), condition=2, two_sided=True)
    flow = randomised(Flow([ActNorm(channels), Mixing(channels), coupling(), Mixing(channels, "lu"), coupling()]))
    x, condition = torch.randn(batch, channels, height, width), torch.randn(batch, 2, height, width)

    def apart(maps):
        return maps.movedim(1, -1).flatten(0, -2)[:, :, None, None]

    z, added = flow.at_positions(x, condition)
    alone, log_det = flow(apart(x), apart(condition))
    torch.testing.assert_close(apart(z), alone)
    torch.testing.assert_close(added.flatten(), log_det)


@given(
    st.integers(2, 9),
    st.integers(1, 4),
    st.sampled_from(["plain", "lu", "orthogonal", "permutation"]),
    st.floats(-2, 3),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_inverse_of_any_stack(channels, steps, mixing, unit, seed):
    torch.manual_seed(seed)
    flow = glow(channels, 0, mixing, steps).train()
    x = 10**unit * torch.randn(64, channels)
    flow(x)
    with torch.no_grad():
        for block in flow.blocks:
            if isinstance(block, Coupling):
                randomised(block)
        z = flow.eval()(x)[0]
        assert relative(flow.inverse(z), x) < 1e-8


@pytest.mark.parametrize("spatial_first", [False, True])
def test_cbam_is_that_of_timm(spatial_first):
    """With the normalisation left out that timm, unlike the text of the paper, puts into the spatial attention."""
    ours = randomised(CBAM(32, 8, spatial_first=spatial_first))
    theirs = CbamModule(32, rd_ratio=1 / 8).double()
    theirs.spatial.conv.bn = nn.Identity()
    with torch.no_grad():
        theirs.channel.fc1.weight.copy_(ours.channel[0].weight)
        theirs.channel.fc2.weight.copy_(ours.channel[2].weight)
        theirs.spatial.conv.conv.weight.copy_(ours.spatial.weight)
        x = torch.randn(2, 32, 6, 5)
        orders = [theirs(x), theirs.channel(theirs.spatial(x))]
        torch.testing.assert_close(ours(x), orders[spatial_first])
    assert not torch.allclose(*orders, rtol=1e-3)
    subnet = convolutions("ACACA", spatial_first=spatial_first)(32, 64)
    assert [part.spatial_first for part in subnet if isinstance(part, CBAM)] == 3 * [spatial_first]


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_cbam_dampens(channels, reduction, height, width, seed):
    torch.manual_seed(seed)
    block = CBAM(channels, reduction)
    x = 5 * torch.randn(2, channels, height, width)
    out = block(x).detach()
    assert out.shape == x.shape
    assert (out.abs() <= x.abs()).all()
    assert (out * x >= 0).all()
    count = sum(parameter.numel() for parameter in block.parameters())
    assert count == 2 * channels * max(1, channels // reduction) + 98


@pytest.mark.parametrize(("channels", "height", "width"), [(4, 3, 2), (12, 5, 7), (128, 8, 8)])
def test_position_code_is_that_of_cflow(channels, height, width):
    half = channels // 2
    expected = np.zeros((channels, height, width))
    for row in range(height):
        for column in range(width):
            for k in range(half // 2):
                frequency = 1e4 ** (-2 * k / half)
                expected[2 * k, row, column] = math.sin(column * frequency)
                expected[2 * k + 1, row, column] = math.cos(column * frequency)
                expected[half + 2 * k, row, column] = math.sin(row * frequency)
                expected[half + 2 * k + 1, row, column] = math.cos(row * frequency)
    code = position_code(channels, height, width)
    assert code.dtype == torch.float32
    np.testing.assert_allclose(code, expected, atol=1e-7)


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_position_code_symmetry(quarters, height, width):
    code = position_code(4 * quarters, height, width)
    assert torch.equal(code[::2, 0, 0], torch.zeros(2 * quarters, dtype=torch.float32))
    assert torch.equal(code[1::2, 0, 0], torch.ones(2 * quarters, dtype=torch.float32))
    exchanged = position_code(4 * quarters, width, height).transpose(1, 2)
    assert torch.equal(code, exchanged.roll(2 * quarters, 0))


@pytest.mark.parametrize("channels", [6, 7])
@pytest.mark.parametrize("condition", [0, 3])
@pytest.mark.parametrize("shape", [(), (3, 2)], ids=["vectors", "maps"])
@pytest.mark.parametrize("mixing", ["orthogonal", "permutation"])
def test_parity_with_freia_all_in_one_block(mixing, shape, condition, channels):
    modules = pytest.importorskip("FrEIA.modules")
    subnet = convolutions(zero=False) if shape else mlp(2.0, zero=False)
    theirs = modules.AllInOneBlock(
        [(channels, *shape)],
        [(condition, *shape)] if condition else [],
        subnet,
        affine_clamping=1.9,
        global_affine_type="SOFTPLUS",
        permute_soft=mixing == "orthogonal",
    ).double()
    with torch.no_grad():
        theirs.global_scale += torch.randn_like(theirs.global_scale)
        theirs.global_offset += torch.randn_like(theirs.global_offset)
    coupling = Coupling(channels, subnet, condition=condition, clamp="tenth", bound=1.9)
    norm, mix = ActNorm(channels, start="identity", scale="softplus"), Mixing(channels, mixing)
    coupling.of_first.load_state_dict(theirs.subnet.state_dict())
    norm.load_state_dict(
        {
            "theta": theirs.global_scale.flatten(),
            "offset": theirs.global_offset.flatten(),
            "initialised": torch.tensor(True),
        }
    )
    matrix = theirs.w_perm.detach().reshape(channels, channels)
    mix.load_state_dict({"matrix": matrix} if mixing == "orthogonal" else {"order": matrix.argmax(1)})
    compare(Flow([coupling, norm, mix]), theirs, 5 * torch.randn(3, channels, *shape), condition)


@pytest.mark.parametrize("channels", [6, 7])
@pytest.mark.parametrize("condition", [0, 3])
@pytest.mark.parametrize("shape", [(), (3, 2)], ids=["vectors", "maps"])
@pytest.mark.parametrize(
    ("clamp", "bound", "activation"),
    [
        ("tanh", 1.0, "TANH"),
        ("atan", 1.0, "ATAN"),
        ("tanh", 1.9, lambda a: torch.tanh(a / 1.9)),
        ("atan", 1.9, lambda a: 0.636 * torch.atan(a / 1.9)),
        ("sigmoid", 1.0, lambda a: (a + 2).sigmoid().log()),
        ("none", 1.0, lambda a: a),
    ],
)
def test_parity_with_freia_glow_coupling(clamp, bound, activation, shape, condition, channels):
    """Its release 0.2 bounds by c f(a), where its older ones, and the papers, have c f(a / c): the same at c = 1."""
    modules = pytest.importorskip("FrEIA.modules")
    subnet = convolutions("CAC", zero=False) if shape else mlp(8, layers=3, zero=False)
    theirs = modules.GLOWCouplingBlock(
        [(channels, *shape)],
        [(condition, *shape)] if condition else [],
        subnet,
        clamp=bound,
        clamp_activation=activation,
        split_len=channels - channels // 2,
    ).double()
    ours = Coupling(channels, subnet, condition=condition, two_sided=True, clamp=clamp, bound=bound)
    ours.of_first.load_state_dict(theirs.subnet1.state_dict())
    ours.of_second.load_state_dict(theirs.subnet2.state_dict())
    compare(ours, theirs, 5 * torch.randn(3, channels, *shape), condition)


def test_parity_with_freia_separate_networks():
    modules = pytest.importorskip("FrEIA.modules")
    subnet = mlp(8, zero=False)
    theirs = modules.RNVPCouplingBlock([(6,)], [], subnet, clamp=1.0, clamp_activation="TANH").double()
    ours = Coupling(6, partial(Separate, subnet), two_sided=True, clamp="tanh", bound=1.0)
    for part, number in ((ours.of_first, 1), (ours.of_second, 2)):
        part.scale.load_state_dict(getattr(theirs, f"subnet_s{number}").state_dict())
        part.shift.load_state_dict(getattr(theirs, f"subnet_t{number}").state_dict())
    compare(ours, theirs, 5 * torch.randn(3, 6), 0)


@torch.no_grad()
def compare(ours, theirs, x, condition):
    beside = torch.randn(len(x), condition, *x.shape[2:]) if condition else None
    z, log_det = ours(x, beside)
    (expected,), expected_log_det = theirs([x], [beside] if condition else [])
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-9, atol=1e-9)
    drawn = torch.randn_like(x)
    (expected,), _ = theirs([drawn], [beside] if condition else [], rev=True)
    torch.testing.assert_close(ours.inverse(drawn, beside), expected, rtol=1e-9, atol=1e-9)


def test_heavy_tails_do_not_break_training():
    """Eight blocks on maps without variance: single values are hundreds of times the typical one."""
    subnets = [convolutions("CAC", reduction=2), convolutions(side=1)]
    torch.set_default_dtype(torch.float32)
    flow = Flow(
        block for i in range(8) for block in (ActNorm(8), Mixing(8, "permutation"), Coupling(8, subnets[i % 2]))
    )
    optimiser = torch.optim.Adam(flow.parameters(), lr=5e-3, fused=True)
    x = 10 * torch.distributions.StudentT(torch.tensor(1.5)).sample((16, 8, 4, 4))
    for step in range(150):
        loss = nll(flow, x[4 * (step % 4) :][:4], None)
        assert torch.isfinite(loss)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        assert relative(flow.inverse(flow.eval()(x)[0]), x) < 1e-4


@traced
def test_determinants_beyond_the_range_of_floats(tmp_path):
    """exp(log_det) of many channels overflows even float64: it is never formed, not in a graph either."""
    torch.set_default_dtype(torch.float32)
    mixing = Mixing(400)
    with torch.no_grad():
        mixing.matrix.mul_(10)
    path = tmp_path / "mixing.onnx"
    torch.onnx.export(mixing.eval(), (torch.randn(1, 400),), path, input_names=["x"], dynamo=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(1, 400)
    for log_det in (mixing(x)[1].detach(), session.run(None, {"x": x.numpy()})[1]):
        np.testing.assert_allclose(log_det, 400 * math.log(10), rtol=1e-5)


@traced
@pytest.mark.parametrize("name", ["glow", "glow lu", "all in one", "attentive"])
def test_onnx_graph(name, tmp_path):
    """z, log-determinants and the inverse of a scaled z in one graph, with another batch size than the traced one."""

    class Reverted(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = trained(name)

        def forward(self, x, condition=None):
            z, log_det = self.flow.at_positions(x, condition)
            return z, log_det, self.flow.inverse(0.5 * z, condition)

    torch.set_default_dtype(torch.float32)
    module, path = copy.deepcopy(Reverted()).float(), tmp_path / "flow.onnx"
    inputs = [part.float() for part in toy(name, n=5) if part is not None]
    names = ["x", "condition"][: len(inputs)]
    torch.onnx.export(
        module,
        tuple(part[:2] for part in inputs),
        path,
        input_names=names,
        dynamic_axes={part: {0: "n"} for part in names},
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {part: values.numpy() for part, values in zip(names, inputs, strict=True)})
    with torch.no_grad():
        for ours, expected in zip(found, module(*inputs), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_inverse_on_the_channels_of_the_default_backbone():
    """Six steps of Glow on 152 channels of units that differ a hundredfold, in float32, after a few steps."""
    torch.set_default_dtype(torch.float32)
    flow = Flow(block for _ in range(6) for block in (ActNorm(152), Mixing(152), Coupling(152, mlp(152, layers=3))))
    optimiser = torch.optim.Adam(flow.parameters(), lr=2e-3, fused=True)
    x = torch.randn(256, 152) @ torch.randn(152, 152) * torch.logspace(-1, 1, 152)
    for _ in range(10):
        loss = nll(flow, x, None) / 152
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        z = flow.eval()(x)[0]
        assert relative(flow.inverse(z), x) < 1e-4
