"""Types as JSON Schema (2020-12), for the API documents.

The schemas are made from the very types that validate what comes in and encode what goes out. msgspec makes them; what
it does not know is added here: members that are left out instead of null, a choice of several shapes, JSON that is
handed on as it is (`Holds`), and members of the schema that no field tells (`SCHEMA`, a ClassVar of the type).
"""

from __future__ import annotations

import inspect
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import UNSET, Meta, UnsetType

from models.base import Holds

JsonSchema = dict[str, Any]

REF = "#/components/schemas/{name}"


class Shapes:
    """Collects types, then gives each of them as a schema. Structs and enums become components."""

    def __init__(self) -> None:
        self._asked: list[Any] = []
        self._twins: dict[type[msgspec.Struct], type[msgspec.Struct]] = {}
        self._choices: dict[type, list[type[msgspec.Struct]]] = {}
        self._made: list[JsonSchema] = []
        self.components: dict[str, JsonSchema] = {}

    def add(self, type_: Any) -> int:
        """Ask for the schema of a type; `schema` takes the number once `make` was called."""
        self._asked.append(self._document(type_))
        return len(self._asked) - 1

    def make(self) -> None:
        every = [*self._asked, *self._twins.values()]
        made, components = msgspec.json.schema_components(every, schema_hook=self._choice, ref_template=REF)
        for original, twin in self._twins.items():
            components[twin.__name__].update(vars(original).get("SCHEMA", {}))
        self._made = [_portable(schema) for schema in made]
        self.components = {name: _portable(components[name]) for name in sorted(components)}

    def schema(self, number: int) -> JsonSchema:
        return self._made[number]

    def component(self, number: int) -> str:
        """Name of the component that `schema(number)` refers to."""
        return component_of(self._made[number])

    def told(self, schema: JsonSchema) -> str:
        """The description of what the schema refers to, on one line."""
        return " ".join(self._named(schema).get("description", "").split())

    def examples(self, schema: JsonSchema) -> list[Any]:
        found: list[Any] = self._named(schema).get("examples", [])
        return found

    def _named(self, schema: JsonSchema) -> JsonSchema:
        return self.components[component_of(schema)] if "$ref" in schema else schema

    def _choice(self, type_: type) -> JsonSchema:
        return {"anyOf": [{"$ref": REF.format(name=one.__name__)} for one in self._choices[type_]]}

    def _document(self, annotation: Any) -> Any:
        """The annotation with every struct in it replaced by its twin."""
        if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
            return self._twin(annotation)
        origin, args = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            held = [one.shape for one in annotation.__metadata__ if isinstance(one, Holds)]
            told = [one for one in annotation.__metadata__ if isinstance(one, Meta)]
            found = self._document(held[0] if held else annotation.__origin__)
            return reduce(lambda type_, meta: Annotated[type_, meta], told, found)
        if origin in (Union, UnionType):
            members = [self._document(one) for one in args]
            structs = [one for one in members if isinstance(one, type) and issubclass(one, msgspec.Struct)]
            if len(structs) > 1:
                choice = type("Or".join(one.__name__ for one in structs), (), {})
                self._choices[choice] = structs
                members = [choice, *(one for one in members if one not in structs)]
            return reduce(or_, members)
        if origin is Literal and isinstance(args[0], bool):  # msgspec knows no schema for it
            return Annotated[bool, Meta(extra_json_schema={"const": args[0]})]
        if origin in (None, Literal):
            return annotation
        return origin[tuple(self._document(one) for one in args)]

    def _twin(self, struct: type[msgspec.Struct]) -> type[msgspec.Struct]:
        """The struct as it is on the wire: what `omit_defaults` leaves out is optional and never null."""
        if struct in self._twins:
            return self._twins[struct]
        config = struct.__struct_config__
        members: list[tuple[str, Any, Any]] = []
        for field in msgspec.structs.fields(struct):
            if _hidden(field.type):
                continue
            type_, default = self._document(field.type), field.default
            if config.omit_defaults and default is None:
                type_, default = _never_null(type_), UNSET
            members.append(
                (field.name, type_, msgspec.field(name=field.encode_name, default=default))
                if field.default_factory is msgspec.NODEFAULT
                else (field.name, type_, msgspec.field(name=field.encode_name, default_factory=field.default_factory))
            )
        twin = msgspec.defstruct(
            struct.__name__,
            members,
            kw_only=True,
            forbid_unknown_fields=config.forbid_unknown_fields,
            module=struct.__module__,
            namespace={"__doc__": inspect.cleandoc(struct.__doc__)} if struct.__doc__ else {},
        )
        self._twins[struct] = twin
        return twin


def _hidden(annotation: Any) -> bool:
    """Members that are known but always refused until a later version are not documented."""
    if get_origin(annotation) is Annotated:
        return any(isinstance(one, Meta) and (one.extra or {}).get("later") for one in annotation.__metadata__)
    return any(_hidden(one) for one in get_args(annotation))


def _never_null(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        inner = _never_null(annotation.__origin__)
        return reduce(lambda type_, meta: Annotated[type_, meta], annotation.__metadata__, inner)
    if annotation is Any:  # anything, when it is there
        return annotation
    return reduce(or_, [one for one in get_args(annotation) if one is not type(None)]) | UnsetType


def _portable(schema: Any) -> Any:
    """The schema with patterns that mean the same in ECMA-262, which JSON Schema asks for, and in Python."""
    if isinstance(schema, dict):
        return {
            key: value.replace(r"\Z", "$") if key == "pattern" and isinstance(value, str) else _portable(value)
            for key, value in schema.items()
            if not (key == "default" and value is None)
        }
    return [_portable(one) for one in schema] if isinstance(schema, list) else schema


def component_of(schema: JsonSchema) -> str:
    """Name of the component that the schema refers to."""
    name: str = schema["$ref"].rsplit("/", 1)[1]
    return name
