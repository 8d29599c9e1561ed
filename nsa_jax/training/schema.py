"""Nested settings read against the fields of dataclasses: all that is wrong, with the right names.

Imports no JAX: the command line needs the nearest right name before anything heavy is loaded.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


def flatten(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns nested keys as dotted ones: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: Mapping, new: Mapping, ignore: Iterable[str] = ()) -> list[str]:
    """Returns one line for each dotted key whose value differs: "a.b: was 1, is 2".

    Args:
      old: nested values.
      new: nested values.
      ignore: dotted keys that may differ; a section's name stands for all keys in it.
    """
    ignore = tuple(ignore)
    before, after = flatten(old), flatten(new)
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        if any(key == name or key.startswith(f"{name}.") for name in ignore):
            continue
        if key not in before:
            lines.append(f"{key}: was not there, is {after[key]!r}")
        elif key not in after:
            lines.append(f"{key}: was {before[key]!r}, is not there")
        elif before[key] != after[key]:
            lines.append(f"{key}: was {before[key]!r}, is {after[key]!r}")
    return lines


def unknown_key(key: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns the sentence for an unknown dotted key, with the nearest of the known ones.

    Args:
      key: the unknown one.
      known: all right ones.
      prefix: put before each key that is named, as the command line writes them.
    """
    known = list(known)
    section, _, leaf = key.rpartition(".")
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    for candidates, cutoff in ((elsewhere, 0.0), (siblings, 0.6), (known, 0.6)):
        nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=cutoff)
        if nearest:
            return f"{prefix}{key}: there is no such key; the nearest is {prefix}{nearest[0]}"
    return f"{prefix}{key}: there is no such key"


def field_types(section_type: type, without: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the names and types of a dataclass's fields, those in `without` left out."""
    hints = typing.get_type_hints(section_type)
    names = [field.name for field in dataclasses.fields(section_type)]
    return {name: hints[name] for name in names if name not in tuple(without)}


class Reader:
    """Reads nested values against a schema and collects every problem instead of the first.

    Attributes:
      values: the values that are there and of the right type, nested like the schema.
      problems: one sentence for each thing that is wrong.
    """

    def __init__(self, values: Mapping, schema: Mapping):
        """Reads.

        Args:
          values: nested values, from a person.
          schema: the same nesting, with a type for each value.
        """
        self.problems: list[str] = []
        self._known = list(flatten(schema))
        self.values = self._read(values, schema, "")

    def _read(self, values: Mapping, schema: Mapping, prefix: str) -> dict:
        self.problems += [f"{prefix}{name}: missing" for name in schema if name not in values]
        read = {}
        for name, value in values.items():
            key = f"{prefix}{name}"
            if name not in schema:
                self.problems.append(unknown_key(key, self._known))
            elif isinstance(schema[name], Mapping) != isinstance(value, Mapping):
                kind = "a section" if isinstance(schema[name], Mapping) else "a single value"
                self.problems.append(f"{key}: must be {kind}")
            elif isinstance(value, Mapping):
                read[name] = self._read(value, schema[name], f"{key}.")
            else:
                try:
                    read[name] = _typed(value, schema[name])
                except TypeError as error:
                    self.problems.append(f"{key}={value!r}: {error}")
        return read

    def build(self, section_type: type, name: str, **derived: Any) -> Any:
        """Returns the section `name` as its dataclass, or None where something is wrong in it.

        Args:
          section_type: a dataclass that raises ValueError on values that do not fit.
          name: key of the section.
          **derived: the fields that are no keys of the section.
        """
        given = self.values.get(name, {}) | derived
        if {field.name for field in dataclasses.fields(section_type)} - set(given):
            return None  # what is missing or of a wrong type has been noted already
        try:
            return section_type(**given)
        except ValueError as error:
            # A derived field is no key of this section; where it comes from, it has the same name.
            foreign = str(error).partition("=")[0] in derived
            self.problems.append(str(error) if foreign else f"{name}: {error}")
            return None


def _typed(value: Any, expected: Any) -> Any:
    """Returns `value` as `expected`; an int may stand for a float, and a list for a tuple.

    Raises:
      TypeError: if it cannot; the text says what is expected.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Literal:
        if value not in arguments:
            raise TypeError(f"must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _typed(value, option)
            except TypeError:
                continue
        raise TypeError(f"must be {expected}")
    if origin is tuple or expected is tuple:
        if not isinstance(value, tuple | list):
            raise TypeError("must be a tuple")
        return tuple(_typed(item, arguments[0]) for item in value) if arguments else tuple(value)
    if expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise TypeError("must be a finite number")
        return number
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise TypeError(f"must be {_type_name(expected)}, not {_type_name(type(value))}")
    return value


def _type_name(kind: type) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, kind.__name__)
