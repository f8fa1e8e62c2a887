"""The API holds what its OpenAPI says, whatever is sent."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from flawmap.service.api import create_app
from flawmap.service.service import Options, open_service

ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/models/{name}/inspections"),
    ("GET", "/v1/inspections"),
    ("GET", "/v1/export.csv"),
    ("GET", "/v1/export.jsonl"),
    ("GET", "/v1/inspections/{number}"),
    ("GET", "/v1/inspections/{number}/picture"),
    ("GET", "/v1/inspections/{number}/overlay"),
    ("GET", "/v1/inspections/{number}/map"),
    ("PUT", "/v1/inspections/{number}/word"),
    ("GET", "/v1/inspections/{number}/words"),
    ("GET", "/v1/models/{name}/threshold"),
    ("PUT", "/v1/models/{name}/threshold"),
    ("GET", "/v1/models/{name}/thresholds"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def schema(exported, tmp_path_factory):
    service = open_service([exported], Options(tmp_path_factory.mktemp("store"), threads=1))
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    service.close()


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_answers_are_those_that_are_described(schema, method, path):
    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy())
    def holds(case):
        case.call_and_validate()

    holds()


def test_the_schema_describes_every_route(schema):
    described = {(operation.ok().method.upper(), operation.ok().path) for operation in schema.get_all_operations()}
    assert described == set(ROUTES)
