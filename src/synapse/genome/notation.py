"""How a stack of layers is typed: ``captain:0.8,dates``."""

from __future__ import annotations

from synapse.errors import InvalidInput

NOTATION = "NAME or NAME:WEIGHT, separated by commas, in the order they are applied; a weight is from 0 to 1"


def parse_layers(text: str) -> list[tuple[str, float]]:
    """``captain:0.8,dates`` → ``[("captain", 0.8), ("dates", 1.0)]``; an empty text is no layers.

    Raises:
        InvalidInput: a name is missing, or a weight is no number from 0 to 1.
    """
    layers: list[tuple[str, float]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = -1.0
        if not name or not 0 <= weight <= 1:
            raise InvalidInput(
                f"a layer is NAME or NAME:WEIGHT with a weight from 0 to 1, not {part!r:.120}",
                hint="for example --layers captain:0.8,dates",
            )
        layers.append((name, weight))
    return layers
