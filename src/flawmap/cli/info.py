"""flawmap info"""

from __future__ import annotations

from pathlib import Path

import click

from flawmap.cli.options import PLUGIN
from flawmap.cli.say import say


@click.command("info")
@click.argument("model", type=click.Path(path_type=Path))
@PLUGIN
def info_command(model: Path) -> None:
    """Say what MODEL holds: method, settings, images learnt from, and what its threshold promises."""
    from flawmap.cli.progress import quiet_libraries

    quiet_libraries()
    from flawmap.line.inspector import read_card
    from flawmap.text import counted

    card, known = read_card(model)
    calibration = "none"
    if card.calibration is not None:
        calibration = f"{card.calibration.mode}, {counted(len(card.calibration.scores), 'good image')}"
    preparation, training = card.preparation, card.training
    height, width = preparation.size
    learnt = counted(training["images"], "good image")
    lines = {
        "file": f"{model} ({model.stat().st_size / 1e6:.1f} MB, {known['kind']})",
        "digest": known["digest"] or "not known",
        "method": card.method,
        "preset": training.get("preset", "none"),
        "settings": ", ".join(f"{key}={value}" for key, value in sorted(card.config.items())),
        "can be moved": ", ".join(known["live"]) or "nothing",
        "backbone": f"{card.backbone}, levels {', '.join(card.levels)}, weights {card.backbone_digest[:12]}",
        "input": f"{height} x {width} pixels (height x width), {preparation.geometry}",
        "bits": "16" if preparation.preprocessing.deep else "8",
        "region": "everywhere" if preparation.region is None else "a region of interest",
        "alignment": "none" if preparation.template is None else "to a template",
        "learnt from": f"{learnt}, seed {training['seed']}, engine {training['engine']}",
        "captures": "refused where unlike the good images" if card.capture_check else "not checked",
        "calibration": calibration,
        "promise": card.judge().describe(),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(training.get("libraries", {}).items()))
        or "not known",
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        say(f"{name:<{width}}  {text}")
