"""Decisions through OpenFeature (openfeature.dev), so that a user's own flag service can make them.

Three flags a hot path, in the domain `synapse.hotpath`; PATH is its name, and the targeting key of the evaluation:

=============================  =======  ===========================================================================
`hotpath.PATH.stage`           string   the name of the stage that is in force
`hotpath.PATH.force-python`    boolean  the reference answers everything
`hotpath.PATH.quarantine`      boolean  the same for this build (attribute `build` of the evaluation)
=============================  =======  ===========================================================================

When nobody has registered a provider, ours answers with what the rollout says. A provider of the user's is asked
instead, and the rollout's answer is the default of every question, so a service that knows only one of the flags
changes only that one. What a process has seen a build do is stronger than any flag: none lifts a hold or a quarantine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from openfeature import api
from openfeature.evaluation_context import EvaluationContext
from openfeature.flag_evaluation import FlagResolutionDetails, Reason
from openfeature.provider import AbstractProvider, Metadata
from openfeature.provider.no_op_provider import NoOpProvider

if TYPE_CHECKING:
    from openfeature.flag_evaluation import FlagValueType

DOMAIN = "synapse.hotpath"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Flags:
    """What the flags say about a build: the name of its stage, and whether it is switched off."""

    stage: str
    force_python: bool = False
    quarantine: bool = False


class RolloutProvider(AbstractProvider):
    """Our own provider: its flags are what the rollouts say, set by `publish`."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, str | bool] = {}

    def publish(self, path: str, flags: Flags) -> None:
        """Set the three flags of a hot path."""
        self._values |= {
            f"hotpath.{path}.stage": flags.stage,
            f"hotpath.{path}.force-python": flags.force_python,
            f"hotpath.{path}.quarantine": flags.quarantine,
        }

    def get_metadata(self) -> Metadata:
        return Metadata(name=DOMAIN)

    def _resolve(self, flag_key: str, default_value: T) -> FlagResolutionDetails[T]:
        value = self._values.get(flag_key)
        if isinstance(value, type(default_value)):
            return FlagResolutionDetails(value, reason=Reason.TARGETING_MATCH)
        return FlagResolutionDetails(default_value, reason=Reason.DEFAULT)

    def resolve_boolean_details(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        return self._resolve(flag_key, default_value)

    def resolve_string_details(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        return self._resolve(flag_key, default_value)

    def resolve_integer_details(
        self, flag_key: str, default_value: int, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[int]:
        return self._resolve(flag_key, default_value)

    def resolve_float_details(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        return self._resolve(flag_key, default_value)

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        return self._resolve(flag_key, default_value)


_ours = RolloutProvider()


def evaluate(path: str, build: str, rollout: Flags) -> Flags:
    """What the provider says, when the rollout says this. A provider that fails changes nothing."""
    if api.get_provider_metadata(DOMAIN).name == NoOpProvider().get_metadata().name:
        api.set_provider_and_wait(_ours, DOMAIN)
    _ours.publish(path, rollout)
    client = api.get_client(DOMAIN)
    context = EvaluationContext(targeting_key=path, attributes={"build": build})
    return Flags(
        stage=client.get_string_value(f"hotpath.{path}.stage", rollout.stage, context),
        force_python=client.get_boolean_value(f"hotpath.{path}.force-python", rollout.force_python, context),
        quarantine=client.get_boolean_value(f"hotpath.{path}.quarantine", rollout.quarantine, context),
    )
