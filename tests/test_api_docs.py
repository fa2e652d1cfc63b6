"""docs/api.md says what is so: its tables are the schema's, its examples run, its tests exist.

`python -m tests.test_api_docs` writes the tables and the examples' answers anew.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from service.api.megatron import REQUEST_SCHEMAS as MEGATRON
from service.api.schemas import CompletionRequest
from service.api.scoring import REQUEST_SCHEMAS as SCORING
from service.api.tokens import REQUEST_SCHEMAS as TOKENS
from tests.commands import curl
from tests.test_readme import ROOT, served_demo

PAGE = ROOT / "docs/api.md"
FIELDS = re.compile(r"^<!-- (\w+): (.*?) -->\n\n((?:\|.*\n)+)", re.MULTILINE)
EXAMPLES = re.compile(r"^```console\n\$ (curl .*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TESTS = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
HEAD = "| field | takes | default | what |\n| --- | --- | --- | --- |\n"
SCHEMAS = {schema.__name__: schema for schema in (CompletionRequest, *TOKENS, *SCORING, *MEGATRON)}
VARYING = {"created": 1795583089, "system_fingerprint": "fp_…", "model": "megatron-gpt2-demo"}
NUM_REPORTS = 48


def takes(form: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words, without null, which every optional field takes."""
    if forms := form.get("anyOf") or form.get("oneOf"):
        return " or ".join(takes(each, definitions) for each in forms if each != {"type": "null"})
    if "$ref" in form:
        fields = definitions[form["$ref"].rsplit("/", 1)[1]]["properties"]
        return "{" + ", ".join(f"{name}: {takes(field, definitions)}" for name, field in fields.items()) + "}"
    if "const" in form:
        return f"`{form['const']}`"
    if "enum" in form:
        return " or ".join(f"`{value}`" for value in form["enum"])
    match form.get("type"):
        case "array":
            count = _range(form, "minItems", "maxItems")
            return f"list of {count + ': ' if count else ''}{takes(form['items'], definitions)}"
        case "string":
            length = _range(form, "minLength", "maxLength")
            return f"string of {length} characters" if length else "string"
        case "integer" | "number" as kind:
            low = form.get("minimum", form.get("exclusiveMinimum"))
            high = form.get("maximum")
            if "exclusiveMaximum" in form:
                high = form["exclusiveMaximum"] - 1
            bound = f"above {low}" if "exclusiveMinimum" in form else str(low)
            if high is not None and high >= 2**31 - 1:
                high = {2**31 - 1: "2^31 - 1", 2**63 - 1: "2^63 - 1"}[high]
                bound = {-(2**31): "-2^31", -(2**63): "-2^63"}.get(low, bound)
            if low is None:
                return kind
            return f"{kind} {bound}{' or more' if high is None else f' to {high}'}"
        case "object" if "patternProperties" in form:
            (value,) = form["patternProperties"].values()
            return f"object of {_range(form, 'minProperties', 'maxProperties')} token ids: {takes(value, definitions)}"
        case kind:
            return str(kind)


def _range(form: dict[str, Any], least: str, most: str) -> str:
    if most in form:
        return f"{form.get(least, 0)} to {form[most]}"
    return f"{form[least]} or more" if least in form else ""


def row(schema: str, field: str) -> str:
    described = SCHEMAS[schema].model_json_schema()
    about = described["properties"][field]
    default = about.get("default")
    shown = (
        "required" if field in described.get("required", ()) else "" if default is None else f"`{json.dumps(default)}`"
    )
    form = takes(about, described.get("$defs", {}))
    return f"| `{field}` | {form} | {shown} | {about['description']} |\n".replace("<|", "<\\|").replace("|>", "\\|>")


def table(schema: str, fields: str) -> str:
    return HEAD + "".join(row(schema, field) for field in fields.split())


def rounded(value: Any) -> Any:
    """Floats to what any machine gives."""
    match value:
        case float():
            return round(value, 2)
        case dict():
            return {key: rounded(item) for key, item in value.items()}
        case list():
            return [rounded(item) for item in value]
    return value


def answer(command: str, url: str) -> str:
    """What a documented curl command prints, asked of `url`, without what differs from run to run."""
    response = curl(command, url)
    assert 200 == response.status_code or '"error"' in response.text, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        return "".join(f"data: {line if line == '[DONE]' else _shown(line)}\n\n" for line in lines)[:-1]
    return _shown(response.text) + "\n"


def _shown(text: str) -> str:
    value = rounded(json.loads(text))
    value |= {name: shown for name, shown in VARYING.items() if name in value}
    if "id" in value:
        value["id"] = f"{value['id'].split('-')[0]}-…"
    (value.get("usage") or {}).pop("timings", None)
    return json.dumps(value, ensure_ascii=False)


def events(shown: str) -> list[Any]:
    """An answer, or a stream whose pieces of text are joined: how they are cut depends on the moment."""
    lines = [line.removeprefix("data: ") for line in shown.splitlines() if line]
    if lines[-1] != "[DONE]":
        return [json.loads(line) for line in lines]
    chunks = [json.loads(line) for line in lines[:-1]]
    texts = [choice.pop("text") for chunk in chunks for choice in chunk["choices"]]
    return ["".join(texts), *chunks[-2:]]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_demo() as url:
        yield url


def test_every_field_is_there_as_the_schema_has_it() -> None:
    """Each field of each request, once; what it takes, its default and its description."""
    tables = FIELDS.findall(PAGE.read_text())
    listed = [(schema, field) for schema, fields, _ in tables for field in fields.split()]
    expected = [(name, field) for name, schema in SCHEMAS.items() for field in schema.model_fields]
    assert sorted(expected) == sorted(listed)
    for schema, fields, shown in tables:
        assert table(schema, fields) == shown


@pytest.mark.parametrize("command", [command for command, _ in EXAMPLES.findall(PAGE.read_text())])
def test_examples_run(command: str, url: str) -> None:
    """Each prints what the page shows."""
    documented = dict(EXAMPLES.findall(PAGE.read_text()))[command]
    assert events(documented) == events(answer(command, url))


def test_every_group_of_fields_has_an_example() -> None:
    """Below its table, before the next heading."""
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE):
        if FIELDS.search(section):
            assert EXAMPLES.search(section), section[:60]


def test_each_public_report_has_its_tests() -> None:
    """The table of reports has every number once, and each test that it names is there."""
    page = PAGE.read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert [str(number) for number in range(1, NUM_REPORTS + 1)] == [number for number, _, _ in rows]
    for number, _, where in rows:
        named = TESTS.findall(where)
        assert named, f"row {number} names no test"
        for path, name in named:
            assert re.search(rf"def {name}\(", (ROOT / path).read_text()), f"row {number}: no {name} in {path}"


def write() -> None:
    """The tables and the answers, as they are now."""
    page = PAGE.read_text()
    page = FIELDS.sub(lambda match: f"<!-- {match[1]}: {match[2]} -->\n\n{table(match[1], match[2])}", page)
    with served_demo() as url:
        page = EXAMPLES.sub(lambda match: f"```console\n$ {match[1]}\n{answer(match[1], url)}```", page)
    PAGE.write_text(page)


if __name__ == "__main__":
    write()
