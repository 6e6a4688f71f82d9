"""A kernel that doubles a number, for the tests."""

from tiny_parts import FACTOR


@export("tiny_abi_version")
def tiny_abi_version() abi("C") -> Int:
    return 1


@export("tiny_double")
def tiny_double(number: Int) abi("C") -> Int:
    return FACTOR * number
