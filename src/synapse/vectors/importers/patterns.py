"""Vectors and fields of patterns as other programs write them, checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from synapse.vectors.index import LARGEST, MOST_DIMENSIONS

Vector = NDArray[np.float32]
Fields = dict[str, str | bytes]

_TEXT: Final = frozenset(b"\t\n\r" + bytes(range(32, 127)))
_NUMBERS: Final = frozenset(b"0123456789+-.eE, \t\r\n")


class NotAPattern(Exception):
    """Why something is none, in words that are the same for all of that kind."""


def from_hash(found: dict[bytes, bytes], vector_fields: Sequence[str], dim: int | None) -> tuple[Vector, Fields]:
    """Vector and other fields of a hash; a field that is no UTF-8 text stays bytes.

    Raises:
        NotAPattern: it is none.
    """
    try:
        fields = {name.decode(): value for name, value in found.items()}
    except UnicodeDecodeError as error:
        raise NotAPattern("the name of a field is not UTF-8 text") from error
    vector = vector_from_bytes(fields.pop(_vector_field(fields, vector_fields)), dim)
    return vector, {name: _text(value) for name, value in fields.items()}


def from_json(body: bytes, vector_fields: Sequence[str], dim: int | None) -> tuple[Vector, Fields]:
    """Vector and other members of a JSON object; what is no text is given as JSON.

    Raises:
        NotAPattern: it is none.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise NotAPattern("a string that is not JSON") from error
    if not isinstance(found, dict):
        raise NotAPattern("a string that is not a JSON object")
    value = found.pop(_vector_field(found, vector_fields))
    written = value.encode() if isinstance(value, str) and value.isascii() else None
    vector = _checked(value, dim) if written is None else vector_from_bytes(written, dim)
    fields: Fields = {name: one if isinstance(one, str) else json.dumps(one) for name, one in found.items()}
    try:
        "".join(map(str, (*fields, *fields.values()))).encode()
    except UnicodeEncodeError as error:
        raise NotAPattern("a string with half a character in it") from error
    return vector, fields


def vector_from_bytes(body: bytes, dim: int | None = None) -> Vector:
    """A vector written as a JSON list, as numbers with commas between them, or as little-endian float32 numbers.

    Bytes that are all ASCII text are never taken for float32 numbers.

    Raises:
        NotAPattern: it is none of them, has another number of components than `dim`, none, or more than an index can
            have, or one of them is not finite or larger than an index can have.
    """
    if not _TEXT.issuperset(body):
        if len(body) % 4:
            raise NotAPattern("the vector is neither text nor float32 numbers")
        return _checked(np.frombuffer(body, "<f4"), dim)
    if body.lstrip().startswith(b"["):
        try:
            return _checked(json.loads(body), dim)
        except (ValueError, RecursionError) as error:
            raise NotAPattern("the vector is text, but not a list of numbers") from error
    try:
        numbers = [float(part) for part in body.split(b",")] if _NUMBERS.issuperset(body) else None
    except ValueError:
        numbers = None
    return _checked(numbers, dim)


def _checked(numbers: object, dim: int | None) -> Vector:
    if not isinstance(numbers, np.ndarray):
        if not isinstance(numbers, list) or not all(type(one) in (int, float) for one in numbers):
            raise NotAPattern("the vector is text, but not a list of numbers")
        try:
            numbers = np.array(numbers, np.float64)
        except OverflowError as error:
            raise NotAPattern("a component of the vector is not finite, or too large") from error
    if not 1 <= len(numbers) <= MOST_DIMENSIONS:
        raise NotAPattern(f"the vector has not 1 to {MOST_DIMENSIONS} components")
    if dim is not None and len(numbers) != dim:
        raise NotAPattern(f"the vector has not {dim} components")
    if not np.abs(numbers).max() <= LARGEST:  # false for a NaN too
        raise NotAPattern("a component of the vector is not finite, or too large")
    return numbers.astype(np.float32)


def _vector_field(found: dict[str, object] | dict[str, bytes], vector_fields: Sequence[str]) -> str:
    for name in vector_fields:
        if name in found:
            return name
    raise NotAPattern(f"there is no {' or '.join(vector_fields)} in it")


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
