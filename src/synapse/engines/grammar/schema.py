"""A JSON schema as a client writes it, made into one that the grammar library follows exactly.

Two things differ from what JSON Schema says and agree with OpenAI's strict mode: an object that names its properties
has no others unless the schema says so, and no key comes twice (see `keys`). Numbers the library reads as floating
point; where that would be another number, a bound is moved inwards and anything else is refused.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn

from synapse.engines.grammar.errors import BadGrammar

DEEPEST = 100
LARGEST_COUNT = 2**16
"""Largest minLength or minItems: no answer is that long."""
EXACT = 2**53
"""Up to here every whole number is itself as floating point."""
LARGEST_BOUND = 9_200_000_000_000_000_000
"""Just below 64 bits, where the library's ranges end; a wider bound is moved in to here."""
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_ONE = ("additionalProperties", "additionalItems", "contains", "else", "if", "items", "not", "propertyNames", "then")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_PLAIN = {"type", "properties", "required", "title", "description", "$schema", "$id", "default", "examples"}
_NOTES = {"title", "description", "$schema", "$id", "default", "examples", "$defs", "definitions"}
_BOUNDS = {"minLength", "maxLength", "minItems", "maxItems", *_LOWER, *_UPPER}
_SIMPLE = _PLAIN | _NOTES | _BOUNDS | {"additionalProperties", "anyOf", "const", "enum", "items", "$ref"}
LONGEST_SIMPLE = 2**13
LONGEST_WRITTEN = 2**19
Schema = dict[str, Any]


class Prepared(NamedTuple):
    """A schema for the library.

    Attributes:
        open_keys: it has objects with keys that it does not name.
        simple: it is short, and has nothing that could take the library long.
    """

    text: str
    open_keys: bool
    simple: bool


def prepare_schema(source: str) -> Prepared:
    """The schema for the library.

    Raises:
        BadGrammar: it is not a JSON object, nested too deeply, or says what cannot be kept.
    """
    try:
        schema = _object(json.loads(source, parse_constant=_not_json))
        schema.pop("x-guidance", None)  # options of the library, which are not the client's
        walk = _Walk(schema)
        walk.visit(schema, combined=False, depth=0)
        any_open = walk.close()
        return Prepared(_written(schema), any_open, walk.simple and len(source) <= LONGEST_SIMPLE)
    except BadGrammar:
        raise
    except ValueError as error:
        raise BadGrammar(f"the JSON schema is not JSON: {error}") from error
    except RecursionError as error:
        raise BadGrammar("the JSON schema is nested too deeply") from error


def _object(value: object) -> Schema:
    if not isinstance(value, dict):
        raise BadGrammar("a JSON schema is an object", hint='for example {"type": "object", "properties": {…}}')
    return value


class _Walk:
    """Visits every schema within a schema once, and collects the objects that may be closed."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._visited: set[tuple[int, bool]] = set()
        self._objects: dict[int, Schema] = {}
        self._left_open: set[int] = set()
        self.simple = True

    def visit(self, schema: object, *, combined: bool, depth: int) -> None:
        """Check a schema and what is in it.

        Args:
            combined: it holds together with others (in `allOf`, or beside the branches of `anyOf`), which may name
                further properties, so closing it would forbid those.
        """
        if depth > DEEPEST:
            raise BadGrammar(f"the JSON schema is nested more than {DEEPEST} deep")
        if not isinstance(schema, dict) or (id(schema), combined) in self._visited:
            return
        self._visited.add((id(schema), combined))
        _merge_objects(schema, self._root)
        _check_numbers(schema)
        self.simple = self.simple and _is_simple(schema)
        self._objects[id(schema)] = schema
        branches = [branch for name in ("allOf", "anyOf", "oneOf") for branch in _list(schema, name)]
        if "$ref" in schema:
            branches.append(self._target(schema))
        branches += [schema[name] for name in ("if", "then", "else") if name in schema]
        named = "properties" in schema
        # Of what holds together, more than one names properties.
        joined = combined or (named and any(map(self._names_properties, branches)))
        if joined or _ranks(schema, "allOf") > 1:
            self._left_open.add(id(schema))
        for branch in branches:
            in_all = any(branch is member for member in _list(schema, "allOf")) and len(_list(schema, "allOf")) > 1
            self.visit(branch, combined=joined or in_all or (named and branch is not schema), depth=depth + 1)
        for name in _ONE:
            if name not in ("if", "then", "else"):
                self.visit(schema.get(name), combined=False, depth=depth + 1)
        for name in ("prefixItems", "items"):
            for item in _list(schema, name):
                self.visit(item, combined=False, depth=depth + 1)
        for name in _MAPS:
            for item in schema[name].values() if isinstance(schema.get(name), dict) else ():
                if name not in ("$defs", "definitions"):
                    self.visit(item, combined=name == "dependentSchemas", depth=depth + 1)

    def close(self) -> bool:
        """Close the objects that name their properties; True when others are left."""
        any_open = False
        for key, schema in self._objects.items():
            if isinstance(schema.get("properties"), dict) and key not in self._left_open:
                schema.setdefault("additionalProperties", False)
            any_open = any_open or _is_open(schema)
        return any_open

    def _target(self, schema: Schema) -> object:
        """What a `$ref` refers to; None where only the library could know."""
        return _resolve(self._root, schema.get("$ref"))

    def _names_properties(self, branch: object) -> bool:
        for _ in range(DEEPEST):
            if not isinstance(branch, dict):
                return False
            if "properties" in branch:
                return True
            if "$ref" not in branch:
                inner = [each for name in ("allOf", "anyOf", "oneOf") for each in _list(branch, name)]
                return any(isinstance(each, dict) and ("properties" in each or "$ref" in each) for each in inner)
            branch = self._target(branch)
        return False


def _written(schema: Schema) -> str:
    """The schema as JSON. What it shares within itself is written each time, so a short one can become endless."""
    parts, size = [], 0
    for part in json.JSONEncoder().iterencode(schema):
        parts.append(part)
        size += len(part)
        if size > LONGEST_WRITTEN:
            raise BadGrammar(f"the JSON schema has more than {LONGEST_WRITTEN} characters when its parts are combined")
    return "".join(parts)


def _is_simple(schema: Schema) -> bool:
    """Whether this schema by itself is read in a moment: it intersects nothing, and has no pattern."""
    return not schema.keys() - _SIMPLE and ("anyOf" not in schema or not schema.keys() - _NOTES - {"anyOf"})


def _is_open(schema: Schema) -> bool:
    """Whether an object under this schema may have keys that it does not name."""
    kinds = schema.get("type")
    can_be_object = kinds is None or kinds == "object" or (isinstance(kinds, list) and "object" in kinds)
    if not can_be_object or schema.get("patternProperties"):
        return can_be_object
    if schema.get("additionalProperties") is False:
        return False
    # A schema that only points elsewhere, or only lists values, names no object itself.
    return kinds is not None or not schema.keys() & {"$ref", "allOf", "anyOf", "oneOf", "const", "enum"}


def _merge_objects(schema: Schema, root: Schema) -> None:
    """Make `allOf` of plain objects one object, as inheritance is written: only then can it be closed."""
    members = _list(schema, "allOf")
    if len(members) + bool(schema.keys() & {"properties"}) < 2:
        return
    resolved = []
    for member in members:
        target = member
        for _ in range(DEEPEST):
            if not (isinstance(target, dict) and target.keys() - _PLAIN == {"$ref"}):
                break
            target = _resolve(root, target["$ref"])
        resolved.append(target)
    own = {name: value for name, value in schema.items() if name != "allOf"}
    plain = [own, *resolved]
    allowed = _PLAIN | {"$defs", "definitions"}
    if not all(isinstance(each, dict) and not each.keys() - allowed for each in plain):
        return
    if not all(each.get("type", "object") == "object" for each in plain):
        return
    properties: dict[str, Any] = {}
    required: list[str] = []
    for each in plain:
        if not isinstance(each.get("properties", {}), dict) or not isinstance(each.get("required", []), list):
            return
        for name, value in each.get("properties", {}).items():
            properties[name] = {"allOf": [properties[name], value]} if name in properties else value
        required += [name for name in each.get("required", []) if name not in required]
    del schema["allOf"]
    schema |= {"type": "object", "properties": properties, "required": required}


def _check_numbers(schema: Schema) -> None:
    """Refuse numbers that would become others, and move bounds inwards to what floating point can say."""
    for name in ("const", "enum"):
        if name in schema:
            _check_exact(schema[name], name)
    for name in ("minLength", "minItems", "minProperties"):
        count = schema.get(name)
        if isinstance(count, int | float) and count > LARGEST_COUNT:
            raise BadGrammar(f"{name} {count} is more than any answer has", hint=f"at most {LARGEST_COUNT}")
    if _number(schema.get("multipleOf")) and abs(schema["multipleOf"]) > EXACT:
        raise BadGrammar(f"multipleOf {schema['multipleOf']} cannot be kept exactly", hint="use a smaller one")
    for names, direction in ((_LOWER, math.inf), (_UPPER, -math.inf)):
        for name in names:
            if _number(schema.get(name)) and abs(schema[name]) > EXACT:
                schema[name] = _inwards(schema[name], direction, name)


def _check_exact(value: object, name: str) -> None:
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for each in value:
            _check_exact(each, name)
    elif (
        isinstance(value, int | float)
        and abs(value) > EXACT
        and (isinstance(value, float) or _as_library(float(value)) != value)
    ):
        raise BadGrammar(
            f"{name} has the number {value}, which cannot be kept exactly (beyond 2^53)",
            hint="make it a string, or use a smaller number",
        )


def _inwards(bound: float, direction: float, name: str) -> float:
    """The nearest bound in a direction that is the same however it is read."""
    if (bound > LARGEST_BOUND) if direction > 0 else (bound < -LARGEST_BOUND):
        raise BadGrammar(
            f"{name} {bound} is beyond 64 bits and cannot be kept exactly", hint="leave it out, or use a smaller one"
        )
    inner = float(max(min(bound, LARGEST_BOUND), -LARGEST_BOUND))
    towards_more = direction > 0
    while True:
        readings = (int(inner), _as_library(inner))
        if all(r >= bound if towards_more else r <= bound for r in readings):
            return inner
        inner = math.nextafter(inner, direction)


def _as_library(number: float) -> int:
    """How the library writes a large number: the shortest digits that mean it, then zeros."""
    return int(Decimal(repr(number)))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(schema: Schema, name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def _ranks(schema: Schema, name: str) -> int:
    return len(_list(schema, name))


def _resolve(root: Schema, ref: object) -> object:
    """What a reference within the document points to (RFC 6901)."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    at: object = root
    for escaped in ref[1:].split("/")[1:]:
        part = escaped.replace("~1", "/").replace("~0", "~")
        if isinstance(at, dict):
            at = at.get(part)
        elif isinstance(at, list) and part.isdecimal() and int(part) < len(at):
            at = at[int(part)]
        else:
            return None
    return at


def _not_json(name: str) -> NoReturn:
    raise BadGrammar(f"the JSON schema has {name}, which is no number of JSON")
