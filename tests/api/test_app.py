"""The composition: what importing it loads, and the schema that it publishes."""

import subprocess
import sys

from service.api.schemas import CompletionRequest
from tests.api.conftest import Service


def test_importing_the_app_loads_no_torch() -> None:
    """Nor transformers: the API process stays small."""
    code = "import sys, service.api.app; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert not {"torch", "transformers"} & modules


async def test_openapi_describes_every_field(api: Service) -> None:
    """Fields of requests have a description; what may be left out may be null; every reference resolves."""
    schema = (await api.http.get("/openapi.json")).json()
    described = {}
    for path, routes in schema["paths"].items():
        if "post" in routes:
            reference = routes["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            described[path] = schema["components"]["schemas"][reference.rsplit("/", 1)[1]]
    assert {"/v1/completions", "/v1/score", "/tokenize", "/detokenize", "/api"} == described.keys()
    assert CompletionRequest.model_fields.keys() == described["/v1/completions"]["properties"].keys()
    for body in described.values():
        for name, field in body["properties"].items():
            assert field["description"].endswith("."), name
            assert ({"type": "null"} in field.get("anyOf", ())) != (name in body.get("required", ())), name
    names = {part.split('"')[0] for part in str(schema).replace("'", '"').split("#/components/schemas/")[1:]}
    assert names <= schema["components"]["schemas"].keys()


async def test_openapi_lists_every_status(api: Service) -> None:
    """What a route can answer, each error in the envelope; never FastAPI's 422."""
    schema = (await api.http.get("/openapi.json")).json()
    expected = {"200", "400", "404", "413", "429", "500", "503", "504"}
    completions = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert expected == completions.keys()
    assert {"application/json", "text/event-stream"} == completions["200"]["content"].keys()
    for path, routes in schema["paths"].items():
        for operation in routes.values():
            assert operation["responses"].keys() <= expected
            for status, answer in operation["responses"].items():
                if status != "200" and path not in ("/livez", "/readyz", "/health", "/ping"):
                    envelope = answer["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                    assert ("MessageEnvelope" if path == "/api" else "ErrorEnvelope") == envelope
