"""Decisions through OpenFeature."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from openfeature import api
from openfeature.evaluation_context import EvaluationContext
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider

from hotpath.conftest import World
from support.hotpath_kernels import values
from synapse.hotpath import NativeSide
from synapse.hotpath.rollout.flags import DOMAIN, Flags, evaluate
from synapse.hotpath.rollout.plan import BURN_IN_CALLS, Faults

STANDING = Flags("canary")


def service(**flags: str | bool) -> InMemoryProvider:
    """A flag service of the user's that knows some flags of the path `total`."""
    return InMemoryProvider(
        {f"hotpath.total.{name.replace('_', '-')}": InMemoryFlag("on", {"on": flag}) for name, flag in flags.items()}
    )


def test_without_a_service_the_rollout_decides_through_our_own_provider() -> None:
    assert evaluate("total", "b1", STANDING) == STANDING
    assert evaluate("total", "b1", Flags("half", quarantine=True)) == Flags("half", quarantine=True)
    assert api.get_provider_metadata(DOMAIN).name == DOMAIN
    assert api.get_client(DOMAIN).get_string_value("hotpath.total.stage", "") == "half"


def test_our_provider_answers_only_what_it_knows() -> None:
    evaluate("total", "b1", STANDING)
    client = api.get_client(DOMAIN)
    assert client.get_boolean_value("hotpath.total.stage", True) is True
    assert client.get_integer_value("hotpath.total.share", 3) == 3
    assert client.get_float_value("hotpath.total.share", 0.5) == 0.5
    assert client.get_object_value("hotpath.total.share", {"a": 1}) == {"a": 1}


def test_a_service_of_the_user_decides_what_it_knows_and_leaves_the_rest() -> None:
    api.set_provider_and_wait(service(stage="full"), DOMAIN)
    assert evaluate("total", "b1", STANDING) == Flags("full")
    api.set_provider_and_wait(service(force_python=True), DOMAIN)
    assert evaluate("total", "b1", STANDING) == Flags("canary", force_python=True)


def test_a_service_for_everything_is_asked_too() -> None:
    api.set_provider_and_wait(service(quarantine=True))
    assert evaluate("total", "b1", STANDING).quarantine


def test_a_service_learns_which_path_and_build_is_asked_about() -> None:
    asked: list[EvaluationContext | None] = []

    class Listening(InMemoryProvider):
        def resolve_string_details(self, flag_key, default_value, evaluation_context=None):  # type: ignore[no-untyped-def]
            asked.append(evaluation_context)
            return super().resolve_string_details(flag_key, default_value, evaluation_context)

    api.set_provider_and_wait(Listening({}), DOMAIN)
    evaluate("total", "b1", STANDING)
    assert asked[0] is not None
    assert (asked[0].targeting_key, asked[0].attributes["build"]) == ("total", "b1")


def test_a_service_that_fails_changes_nothing() -> None:
    class Broken(InMemoryProvider):
        def resolve_string_details(self, flag_key, default_value, evaluation_context=None):  # type: ignore[no-untyped-def]
            raise ConnectionError("the flag service is away")

    api.set_provider_and_wait(Broken({}), DOMAIN)
    assert evaluate("total", "b1", STANDING) == STANDING


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ({"stage": "full"}, True),
        ({"stage": "full", "force_python": True}, False),
        ({"stage": "full", "quarantine": True}, False),
        ({"stage": "validate"}, False),
        ({"stage": "no-such-stage"}, False),
    ],
)
async def test_a_service_drives_a_path(
    world: World, kernel: Callable[..., NativeSide], flags: dict[str, str | bool], native: bool
) -> None:
    api.set_provider_and_wait(service(**flags), DOMAIN)
    path = world.add(kernel())
    path.report(Faults(burned=BURN_IN_CALLS))
    await world.sync()
    assert path.call(values(1, 2)) == 3
    assert path.native_answered is native
    assert await world.stage() == "validate", "the rollout itself stays where it is"


async def test_no_flag_lifts_a_hold(world: World, kernel: Callable[..., NativeSide]) -> None:
    api.set_provider_and_wait(service(stage="full"), DOMAIN)
    path = world.add(kernel())
    path.report(Faults(burned=BURN_IN_CALLS, wrong="an answer did not agree"))
    await world.sync()
    path.call(values(1))
    assert not path.native_answered
    assert path.decision.why.startswith("held")
