"""flawmap methods says which to take, and all that can be set."""

from __future__ import annotations

import pytest

from flawmap.cli.method_lines import method_lines
from flawmap.methods import METHODS, configure


def test_each_line_says_when_to_take_the_method(flawmap):
    code, out, _ = flawmap("methods")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    for line, entry in zip(lines, METHODS.values(), strict=True):
        assert entry.paper in line
        assert line.endswith(entry.when)
        assert "\n" not in entry.when
    assert "default" in METHODS["gaussbank"].when


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_a_meaning_a_default_and_values(name):
    entry = METHODS[name]
    lines = method_lines(entry)
    start = next(i for i, line in enumerate(lines) if line.startswith("settings"))
    rows = {line.split()[0]: line for line in lines[start + 2 :] if line.startswith("  ")}
    kind = entry.load()
    defaults = {}
    for key, field in kind.Config.model_fields.items():
        assert field.description
        row = rows[key]
        assert row.endswith(field.description)
        assert len(row.removesuffix(field.description).split()) >= 3
        defaults[key] = row[2:].split("  ", 1)[1].strip().split("  ")[0]
    # What is printed can be typed.
    assert configure(kind, defaults) == configure(kind, {})
    for preset in kind.presets:
        assert any(line.startswith(f"  {preset}  ") for line in lines)


def test_a_method_says_its_cost_and_where_it_differs():
    padim, cfa, f2r = ("\n".join(method_lines(METHODS[name])) for name in ("padim", "cfa", "f2r"))
    assert "closed form" in padim
    assert "  learns further images later" in padim
    assert "Where this differs from the paper" in padim
    assert padim.index("presets") < padim.index("Where this differs")
    assert "above 0 to 1000000" in padim
    assert "full, diagonal" in padim
    assert "trains by gradient" in cfa
    assert "cannot learn further images" in cfa
    assert "can be moved after training: alpha, beta" in f2r
    assert "there is no map" in "\n".join(method_lines(METHODS["differnet"]))


def test_an_unknown_name_is_one_line_with_the_choices(flawmap):
    code, out, err = flawmap("methods", "padin")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "unknown method padin: choose cainnflow" in err
