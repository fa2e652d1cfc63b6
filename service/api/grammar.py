"""From response_format and the guided fields to one grammar, checked as the engine will compile it."""

import json
import re
from decimal import Decimal
from math import lcm
from typing import Any
from urllib.parse import unquote

from llguidance import regex_to_lark

from service.api.errors import invalid
from service.api.schemas import CompletionRequest, SchemaFormat, TextFormat
from service.engine.grammar import MAX_ITEMS_IN_ROW, GrammarError, Grammars

FIELDS = ("response_format", "guided_json", "guided_regex", "guided_choice")
_MAX_BYTES = 65_536  # of a grammar
_MAX_PATTERNS = 16  # patternProperties of one object
_MAX_MULTIPLE = 1000  # the least common multiple of all multipleOf, in units of the smallest decimal place
# One space after commas and colons: with any whitespace allowed, a base model goes on with it for ever.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_of(ask: CompletionRequest, grammars: Grammars) -> str | None:
    """The grammar that the text must match, or None. Raises ApiError (400), naming the field.

    Compiles with `grammars`, which is bounded, but may take about a second: call it in a thread.
    """
    given = [name for name in FIELDS if getattr(ask, name) is not None]
    if isinstance(ask.response_format, TextFormat):
        given.remove("response_format")
    if not given:
        return None
    if len(given) > 1:
        raise invalid(given[1], f"cannot be combined with {given[0]}")
    name = given[0]
    grammar = _grammar(ask, name)
    if len(grammar.encode()) > _MAX_BYTES:
        raise invalid(name, f"is larger than {_MAX_BYTES} bytes")
    try:
        grammars.compile(grammar)
    except GrammarError as error:
        raise invalid(name, str(error)) from error
    return grammar


def _grammar(ask: CompletionRequest, name: str) -> str:
    match name:
        case "guided_regex":
            assert ask.guided_regex is not None
            return _regex_grammar(name, ask.guided_regex)
        case "guided_choice":
            assert ask.guided_choice is not None
            return _regex_grammar(name, "|".join(f"(?:{re.escape(choice)})" for choice in ask.guided_choice))
        case "guided_json":
            return _json_grammar(name, ask.guided_json)
        case _ if isinstance(ask.response_format, SchemaFormat):
            return _json_grammar("response_format.json_schema.schema", ask.response_format.json_schema.json_schema)
        case _:
            return _json_grammar(name, {"type": "object"})


def _regex_grammar(param: str, regex: str) -> str:
    try:
        regex.encode()
    except UnicodeEncodeError:
        raise invalid(param, "has half of a surrogate pair, which is no character") from None
    return f"start: /{regex_to_lark(regex, '')}/"  # \d, \w and \s are Unicode's, of the library's version


def _json_grammar(param: str, schema: object) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:  # a text within the body may be nested without bound
            raise invalid(param, f"is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise invalid(param, "must be a JSON schema, which is an object")
    try:
        text = json.dumps({**schema, "x-guidance": _JSON_FORM}, allow_nan=False)  # never the caller's own options
    except (ValueError, RecursionError) as error:
        raise invalid(param, str(error)) from None
    if len(text) > _MAX_BYTES:
        raise invalid(param, f"is larger than {_MAX_BYTES} bytes")
    _check_work(param, schema)
    return f"start: %json {text}"


def _check_work(param: str, schema: dict[str, Any]) -> None:
    """Raises ApiError for what the library's own limits do not bound.

    An automaton for a multiple has a state a remainder, patterns of properties are compared with one another, and
    what the parser has open within the text is found only while it is generated.
    """
    multiples: list[Decimal] = []
    choices = _Choices(schema)
    todo: list[object] = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += node
        if not isinstance(node, dict):
            continue
        todo += node.values()
        multiple = node.get("multipleOf")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool):
            multiples.append(Decimal(str(multiple)).normalize())
        patterns = node.get("patternProperties")
        if isinstance(patterns, dict) and len(patterns) > _MAX_PATTERNS:
            raise invalid(param, f"patternProperties: at most {_MAX_PATTERNS} are supported")
        try:
            alternatives, optional = choices.count(node)
        except RecursionError:
            raise invalid(param, "its $refs and combinations are nested too deeply") from None
        if optional and 4 * optional + 7 * alternatives > MAX_ITEMS_IN_ROW:  # what the library opens, measured
            message = "properties: too many optional ones, over all alternatives, can come at one place"
            raise invalid(param, f"{message}; some {MAX_ITEMS_IN_ROW // 4} are supported")
    places = max((-int(multiple.as_tuple().exponent) for multiple in multiples), default=0)
    if lcm(*(int(multiple.scaleb(max(places, 0))) or 1 for multiple in multiples)) > _MAX_MULTIPLE:
        message = f"multipleOf: the least common multiple of all is over {_MAX_MULTIPLE} of their last decimal place"
        raise invalid(param, message)


class _Choices:
    """Counts what may begin at one place of a text. The library expands combinations, so alternatives multiply."""

    _CAP = 10**6

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._counted: dict[int, tuple[int, int]] = {}  # by the id of a node of the schema, which stays

    def count(self, node: object) -> tuple[int, int]:
        """The alternatives of a schema, and the optional properties that may come next, over all alternatives."""
        if not isinstance(node, dict):
            return 1, 0
        if id(node) not in self._counted:
            self._counted[id(node)] = 1, 0  # in a cycle
            self._counted[id(node)] = self._count(node)
        return self._counted[id(node)]

    def _count(self, node: dict[str, Any]) -> tuple[int, int]:
        parts = [(1, _longest_optional_run(node)), self.count(self._target(node.get("$ref")))]
        if isinstance(node.get("allOf"), list):
            parts += map(self.count, node["allOf"])
        for name in ("anyOf", "oneOf"):
            if isinstance(node.get(name), list) and node[name]:
                counts = [self.count(branch) for branch in node[name]]
                parts.append((sum(count[0] for count in counts), sum(count[1] for count in counts)))
        alternatives, optional = 1, 0
        for other_alternatives, other_optional in parts:
            optional = min(optional * other_alternatives + other_optional * alternatives, self._CAP)
            alternatives = min(alternatives * other_alternatives, self._CAP)
        return alternatives, optional

    def _target(self, ref: object) -> object:
        """What a reference within the schema means; the library itself refuses those that lead out of it."""
        if not isinstance(ref, str) or not ref.startswith("#"):
            return None
        node: object = self._schema
        for step in unquote(ref[1:]).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict):
                node = node.get(step)
            elif isinstance(node, list) and step.isdecimal() and len(step) < 6 and int(step) < len(node):
                node = node[int(step)]
            else:
                return None
        return node


def _longest_optional_run(node: dict[str, Any]) -> int:
    """Properties come in their order, so the next one is among those up to the next that is required."""
    properties, required = node.get("properties"), node.get("required")
    if not isinstance(properties, dict):
        return 0
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    longest = run = 0
    for name in properties:
        run = 0 if name in names else run + 1
        longest = max(longest, run)
    return longest
