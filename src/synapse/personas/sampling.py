"""How a persona samples unless a request says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError

from synapse.errors import InvalidInput
from synapse.store import Value

if TYPE_CHECKING:
    from synapse.engines.request import Sampling

SEED_RANGE = 2**63


Temperature = Annotated[float, Field(ge=0, le=2, description="0 always takes the likeliest token")]
TopP = Annotated[float, Field(gt=0, le=1, description="draw from the likeliest tokens that sum to this probability")]
TopK = Annotated[int, Field(ge=0, description="draw from the k likeliest tokens; 0 from all")]
MinP = Annotated[float, Field(ge=0, le=1, description="draw from tokens at least this share of the likeliest one's")]
RepetitionPenalty = Annotated[float, Field(gt=0, le=10, description="makes repeated tokens less likely; 1 is off")]
FrequencyPenalty = Annotated[float, Field(ge=-2, le=2, description="penalty for every earlier use of a token")]
PresencePenalty = Annotated[float, Field(ge=-2, le=2, description="penalty for having used a token at all")]
MaxTokens = Annotated[int, Field(ge=1, description="longest answer, in tokens; otherwise as long as the context")]
Seed = Annotated[int, Field(ge=-SEED_RANGE, lt=SEED_RANGE, description="same seed, same answer")]


class SamplingChoices(BaseModel):
    """Sampling settings of which any number may be left open."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    frequency_penalty: FrequencyPenalty | None = None
    presence_penalty: PresencePenalty | None = None
    max_tokens: MaxTokens | None = None
    seed: Seed | None = None

    def chosen_sampling(self) -> dict[str, Any]:
        """The settings that were given, by name; None takes `max_tokens` or `seed` away again."""
        return {name: getattr(self, name) for name in SamplingChoices.model_fields if name in self.model_fields_set}


class SamplingDefaults(Value):
    """Sampling settings of a persona. Their meaning is that of `engines.request.Sampling`."""

    temperature: Temperature = 0.7
    top_p: TopP = 0.95
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    frequency_penalty: FrequencyPenalty = 0.0
    presence_penalty: PresencePenalty = 0.0
    max_tokens: MaxTokens | None = None
    seed: Seed | None = None

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """These settings with some of them replaced.

        Raises:
            InvalidInput: a setting does not exist or its value is out of range.
        """
        try:
            return type(self).model_validate(self.model_dump() | dict(overrides))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                known = ", ".join(type(self).model_fields)
                raise InvalidInput(
                    f"there is no sampling setting {name!r}", hint=f"the settings are {known}"
                ) from error
            message = first["msg"].removeprefix("Input ")
            raise InvalidInput(f"{name}: {message}, found {first['input']!r}", param=name) from error

    def to_sampling(self, logit_bias: Mapping[int, float] | None = None) -> Sampling:
        """The same settings as the engine takes them; `max_tokens` is a matter of the request."""
        from synapse.engines.request import Sampling  # noqa: PLC0415 (entities must not load the engine)

        return Sampling(**self.model_dump(exclude={"max_tokens"}), logit_bias=dict(logit_bias or {}))
