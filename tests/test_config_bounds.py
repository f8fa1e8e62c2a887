"""No setting of a method, which a model file may come with, can ask for time or memory without end."""

import types
import typing

import annotated_types
import pytest

from flawmap.methods import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_every_number_has_an_upper_bound(name):
    fields = METHODS[name].load().Config.model_fields
    unbounded = []
    for key, field in fields.items():
        union = isinstance(field.annotation, types.UnionType)
        kinds = typing.get_args(field.annotation) if union else (field.annotation,)
        if {int, float} & set(kinds) and not any(
            isinstance(one, (annotated_types.Le, annotated_types.Lt)) for one in field.metadata
        ):
            unbounded.append(key)
    assert unbounded == []
