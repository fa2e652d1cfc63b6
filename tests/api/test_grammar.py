"""From the fields of constrained decoding to a grammar, over HTTP: what each means, and what is refused."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import service.demo
from service.checkpoint.tokenizer import read_tokenizer
from service.engine.grammar import Grammars
from service.engine.request import Finish
from tests.api.conftest import Service

FOLDER = Path(service.demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(lambda: read_tokenizer(FOLDER), end_of_text_id=50256)


def matches(api: Service, grammars: Grammars, text: str) -> bool:
    """Whether the grammar that the engine was given takes exactly `text`."""
    grammar = api.engine.submits[-1].params.grammar
    assert grammar is not None
    constraint = grammars.compile(grammar)
    try:
        for byte in text.encode():
            constraint.accept(api.tokenizer.token_bytes.index(bytes([byte])))
        constraint.accept(50256)
    except ValueError:
        return False
    return True


PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
FIELDS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"guided_regex": r" 1\d{3}"}, [" 1946"], ["1946", " 194", " 2946"]),
    ({"guided_choice": ["yes", "no", "<x>", "a.b", "é\n"]}, ["yes", "<x>", "a.b", "é\n"], ["ye", "acb", ""]),
    ({"guided_json": PERSON}, ['{"age": 5}'], ['{"age": "5"}', "{}", '{ "age": 5}']),
    ({"guided_json": json.dumps(PERSON)}, ['{"age": 5}'], ["{}"]),
    ({"response_format": {"type": "json_object"}}, ["{}", '{"a": [1, null]}'], ["[]", "x"]),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}},
        ['{"age": 5}'],
        ["{}"],
    ),
]


@pytest.mark.parametrize(("body", "right", "wrong"), FIELDS, ids=lambda value: str(value)[:40])
async def test_each_field_means_its_texts(
    api: Service, grammars: Grammars, body: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    """What the text may be, and what it may not."""
    await api.complete(**body)
    assert all(matches(api, grammars, text) for text in right)
    assert not any(matches(api, grammars, text) for text in wrong)


async def test_text_is_no_constraint(api: Service) -> None:
    """As OpenAI's default."""
    await api.complete(response_format={"type": "text"})
    assert api.engine.submits[-1].params.grammar is None


def optional(count: int, prefix: str = "a") -> dict[str, Any]:
    return {"type": "object", "properties": {f"{prefix}{i}": {"type": "string"} for i in range(count)}}


def nested(levels: int) -> str:
    return '{"items": ' * levels + "{}" + "}" * levels


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
    ({"guided_regex": ".*" * 2000}, "guided_regex", "too complex"),
    ({"guided_regex": "x" * 70_000}, "guided_regex", "65536"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_choice": ["a"] * 1025}, "guided_choice", "at most 1024"),
    ({"guided_choice": ["x" * 100] * 1000}, "guided_choice", "65536"),
    ({"guided_choice": [1]}, "guided_choice.0", "string"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_json": "[]"}, "guided_json", "object"),
    ({"guided_json": '{"minimum": NaN}'}, "guided_json", ""),
    ({"guided_json": '{"minimum": 1e999}'}, "guided_json", ""),
    ({"guided_json": '{"const": "\\ud800"}'}, "guided_json", ""),
    ({"guided_json": nested(400)}, "guided_json", ""),
    ({"guided_json": nested(5000)}, "guided_json", ""),
    ({"guided_json": {"type": "foo"}}, "guided_json", "foo"),
    ({"guided_json": {"not": {}}}, "guided_json", "not"),
    ({"guided_json": {"not": {}, "x-guidance": {"lenient": True}}}, "guided_json", "not"),
    ({"guided_json": {"type": "string", "pattern": "("}}, "guided_json", "unclosed"),
    ({"guided_json": {"$ref": "http://x.invalid/y"}}, "guided_json", "x.invalid"),
    ({"guided_json": {"type": "integer", "multipleOf": 999_983}}, "guided_json", "multipleOf"),
    ({"guided_json": {"anyOf": [{"type": "number", "multipleOf": m} for m in (0.7, 0.11, 1.3)]}}, "guided_json", ""),
    ({"guided_json": {"patternProperties": {f"a{i}": {} for i in range(17)}}}, "guided_json", "patternProperties"),
    ({"guided_json": optional(520)}, "guided_json", "properties"),
    ({"guided_json": {"anyOf": [optional(20, f"a{i}.") for i in range(60)]}}, "guided_json", "properties"),
    ({"guided_json": {"allOf": [optional(199, name) for name in "abc"]}}, "guided_json", "properties"),
    ({"guided_json": {"allOf": [{"anyOf": [optional(1, name)] * 4} for name in "abcd"]}}, "guided_json", "properties"),
    ({"guided_json": {"anyOf": [optional(1, f"a{i}.") for i in range(200)]}}, "guided_json", "properties"),
    ({"guided_json": {"items": {"anyOf": [optional(20)] * 60}}}, "guided_json", "properties"),
    (
        {"guided_json": {"anyOf": [{"$ref": "#/$defs/a~1%62"}] * 3, "$defs": {"a/b": optional(199)}}},
        "guided_json",
        "properties",
    ),
    ({"guided_json": {"anyOf": [{"$ref": "#"}, {"type": "null"}], "type": "object"}}, "guided_json", "circular"),
    ({"guided_json": {"oneOf": [{}, {"type": "string"}]}}, "guided_json", "Use anyOf"),
    (
        {"guided_json": {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(1000)}}},
        "guided_json",
        "too deeply",
    ),
    ({"guided_json": 5}, "guided_json", ""),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"response_format": {}}, "response_format", "type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
        "response_format",
        "foo",
    ),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex"),
    ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json", "response_format"),
]


@pytest.mark.parametrize(("body", "param", "why"), REFUSED, ids=lambda value: str(value)[:40])
async def test_what_cannot_be_used_is_refused(api: Service, body: dict[str, Any], param: str, why: str) -> None:
    """400 that names the field and says why, in one line; the engine hears nothing."""
    response = await api.http.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (400, param) == (response.status_code, error["param"]), error
    assert error["message"].startswith(f"{param}: ")
    assert why in error["message"]
    assert "\n" not in error["message"]
    assert [] == api.engine.submitted


@pytest.mark.parametrize("field", ["guided_regex", "guided_json", "guided_choice"])
async def test_half_of_a_surrogate_pair_is_no_json(api: Service, field: str) -> None:
    """The body's own reading refuses it."""
    body = b'{"%b": %b}' % (field.encode(), b'["\\ud800"]' if field == "guided_choice" else b'"\\ud800"')
    response = await api.http.post("/v1/completions", content=body)
    assert (400, "invalid_json") == (response.status_code, response.json()["error"]["code"])


RICH = [
    optional(480),
    {"anyOf": [optional(20, f"a{i}.") for i in range(20)]},
    {"anyOf": [{**optional(20, f"a{i}."), "required": [f"a{i}.{j}" for j in range(20)]} for i in range(60)]},
    {"anyOf": [{**optional(1, f"a{i}."), "required": [f"a{i}.0"]} for i in range(400)]},
    {**optional(1000), "required": [f"a{i}" for i in range(0, 1000, 10)]},
    {"allOf": [{"anyOf": [optional(1, f"{name}{i}") for i in range(4)]} for name in "abc"]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {**optional(99)["properties"], "b": {"$ref": "#/$defs/a"}}}}},
]


@pytest.mark.parametrize("schema", RICH, ids=range(len(RICH)))
async def test_what_is_taken_can_be_generated(api: Service, grammars: Grammars, schema: dict[str, Any]) -> None:
    """The limits within a text are checked before: its first property, where most is open, raises nothing."""
    response = await api.http.post("/v1/completions", json={"guided_json": schema})
    assert 200 == response.status_code, response.text
    constraint = grammars.compile(str(api.engine.submits[-1].params.grammar))
    words = np.zeros(-(-50257 // 32), np.int32)
    for byte in b'{"':
        constraint.accept(api.tokenizer.token_bytes.index(bytes([byte])))
        constraint.fill(words)
        assert words.any()


async def test_ordinary_schemas_are_taken(api: Service) -> None:
    """With the keywords that people use."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "mail": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 5},
            "size": {"type": "number", "multipleOf": 0.5},
            "more": {"$ref": "#/$defs/more"},
        },
        "required": ["name"],
        "additionalProperties": False,
        "$defs": {"more": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/more"}}]}},
    }
    response = await api.http.post("/v1/completions", json={"guided_json": schema})
    assert 200 == response.status_code, response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_grammar_that_becomes_too_complex_is_no_fault_of_the_server(api: Service, stream: bool) -> None:
    """Some show it only as they go on: 400 with the engine's reason."""
    api.engine.gate.clear()
    body = {"guided_regex": "a+", "stream": stream}
    asking = asyncio.ensure_future(api.http.post("/v1/completions", json=body))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    api.engine.end(api.engine.submitted[0], Finish.GRAMMAR, "the grammar failed: is too complex")
    response = await asking
    assert (400, "grammar_error") == (response.status_code, response.json()["error"]["code"])
