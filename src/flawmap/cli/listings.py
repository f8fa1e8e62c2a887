"""flawmap methods, backbones and doctor. The name comes first on each line; nothing is cut or wrapped."""

from __future__ import annotations

import click

from flawmap.cli.options import PLUGIN


@click.command("methods")
@click.argument("name", required=False)
@PLUGIN
def methods_command(name: str | None) -> None:
    """List the methods with their papers, and when to take which; or say all of the one called NAME."""
    from flawmap.methods.plugins import known_methods

    if name is not None:
        from flawmap.cli.method_lines import method_lines
        from flawmap.methods.registry import entry_of

        click.echo("\n".join(method_lines(entry_of(name))))
        return
    entries = known_methods().values()
    widths = [max(map(len, column)) for column in zip(*((e.name, e.paper) for e in entries), strict=True)]
    for entry in entries:
        click.echo(f"{entry.name:<{widths[0]}}  {entry.paper:<{widths[1]}}  {entry.when}")


@click.command("backbones")
def backbones_command() -> None:
    """List the backbones with their parameters, levels, the origin of their weights and their licence."""
    from flawmap.backbones import summaries

    for backbone in summaries():
        columns = (
            backbone.name,
            f"{backbone.parameters / 1e6:.1f}M",
            backbone.licence,
            f"weights: {backbone.origin}",
            f"used by: {backbone.used_by}",
            f"levels: {','.join(backbone.levels)}",
        )
        click.echo("  ".join(columns))


@click.command("doctor")
def doctor_command() -> int:
    """Check this installation: versions, engines, and whether each engine gives the same features."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from flawmap.line.engines import ENGINES, available_engines, cpu_threads
    from flawmap.text import counted

    cores = counted(cpu_threads(), "core")
    click.echo(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {cores}")
    for package in ("flawmap", "numpy", "scipy", "pillow", "onnxruntime", "openvino", "torch", "torchvision", "timm"):
        try:
            click.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            click.echo(f"{package} not installed")
    if "torch" not in available_engines():
        click.echo("the lab is not installed, so there is nothing to compare engines by: pip install 'flawmap[train]'")
        click.echo("all is well for inspecting with exported models")
        return 0
    import numpy as np
    import torch

    from flawmap.backbones import create_backbone, create_engine

    click.echo(f"cuda {torch.cuda.get_device_name() if torch.cuda.is_available() else 'not available'}")
    backbone = create_backbone(size=(256, 256))
    click.echo(f"backbone {backbone.name}: embedded weights found, digest {backbone.digest()[:12]}")
    images = np.random.default_rng(0).standard_normal((1, 3, 256, 256), dtype=np.float32)
    reference = create_engine(backbone, (256, 256), "torch")(images)
    well = True
    for name in ENGINES:
        if name not in available_engines():
            click.echo(f"engine {name}: not installed")
            continue
        maps = create_engine(backbone, (256, 256), name)(images)
        error = max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(maps, reference, strict=True))
        well &= error < 1e-4
        click.echo(f"engine {name}: {'agrees with torch' if error < 1e-4 else 'DIFFERS FROM TORCH'} ({error:.1e})")
    click.echo("all is well" if well else "an engine differs: use --engine torch and report it")
    return 0 if well else 2
