"""The model file: one safetensors file whose whole metadata is one key of canonical JSON. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flawmap.errors import FlawmapError, shortage
from flawmap.files import open_regular, replacing

FORMAT = 3
_KEY = "flawmap"
_MOST_HEADER = 100_000_000  # bytes, the limit of the format


def write_model(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Writes tensors and metadata, and returns the digest over both; equal arguments give equal bytes.

    `metadata` must be JSON without times, durations or paths. The format's version and a digest over all the rest are
    added.

    Raises:
        FlawmapError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    content = {**metadata, "format": FORMAT}
    content["digest"] = _digest(tensors, content)
    with replacing(path) as file:
        file.write(save(tensors, {_KEY: _canonical(content)}))
    return str(content["digest"])


def is_model(path: Path) -> bool:
    """Whether a file calls itself a flawmap model, or holds nothing at all; it may be damaged all the same."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= _MOST_HEADER else {}
            return _KEY in header.get("__metadata__", {}) or path.stat().st_size == 0
    except (FlawmapError, OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors and metadata of a model file, and the digest over both, by which they were checked.

    Raises:
        FlawmapError: the file is missing, is no flawmap model, was cut off or edited, or is of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FlawmapError(f"model file {path} does not exist: train one with `flawmap train DATA -o {path}`")
    with open_regular(path):
        pass  # told from a pipe or a device, which the library below would wait for
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # A copy: tensors mapped from the file would change or fail with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise shortage(error) or FlawmapError(
            f"{path} is not a whole safetensors file ({error}): copy it again, or train again"
        ) from error
    try:
        content = json.loads(metadata[_KEY])
        version, digest = content["format"], content.pop("digest")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FlawmapError(f"{path} is not a flawmap model: train one with `flawmap train`") from error
    if version != FORMAT:
        raise FlawmapError(f"{path} has format {version}, this flawmap reads {FORMAT}: upgrade flawmap, or train again")
    try:
        whole = digest == _digest(tensors, content)
    except (ValueError, RecursionError):  # a number that is not finite, or lists in lists, which are never written
        whole = False
    if not whole:
        raise FlawmapError(f"{path} was changed after training (its digest differs): copy it again, or train again")
    return tensors, content, str(digest)


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(_canonical(content).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
