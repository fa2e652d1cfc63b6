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


async def test_openapi_describes_request_and_errors(api: Service) -> None:
    """The request's fields with their descriptions, the answer, the envelope; no 422; every reference resolves."""
    schema = (await api.http.get("/openapi.json")).json()
    post = schema["paths"]["/v1/completions"]["post"]
    reference = post["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    request = schema["components"]["schemas"][reference.rsplit("/", 1)[1]]
    assert CompletionRequest.model_fields.keys() == request["properties"].keys()
    assert 4 == len(request["properties"]["prompt"]["anyOf"])
    assert {"200", "default"} == post["responses"].keys()
    assert {"application/json", "text/event-stream"} == post["responses"]["200"]["content"].keys()
    for routes in schema["paths"].values():
        for operation in routes.values():
            assert "422" not in operation["responses"]
            envelope = operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"]
            assert "#/components/schemas/ErrorEnvelope" == envelope
    names = {part.split('"')[0] for part in str(schema).replace("'", '"').split("#/components/schemas/")[1:]}
    assert names <= schema["components"]["schemas"].keys()
