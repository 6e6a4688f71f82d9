from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from synapse.engines.request import Sampling
from synapse.errors import InvalidInput
from synapse.personas.sampling import SamplingChoices, SamplingDefaults


def test_the_defaults_are_lively_but_not_wild() -> None:
    assert SamplingDefaults().to_sampling() == Sampling(temperature=0.7, top_p=0.95)


def test_every_setting_reaches_the_engine_under_its_name() -> None:
    settings = SamplingDefaults(
        temperature=0.1,
        top_p=0.2,
        top_k=3,
        min_p=0.4,
        repetition_penalty=1.5,
        frequency_penalty=0.6,
        presence_penalty=0.7,
        max_tokens=8,
        seed=9,
    )
    assert settings.to_sampling({5: 1.0}) == Sampling(0.1, 3, 0.2, 0.4, 1.5, 0.6, 0.7, 9, {5: 1.0})


def test_choices_and_defaults_know_the_same_settings_as_the_engine() -> None:
    assert SamplingChoices.model_fields.keys() == SamplingDefaults.model_fields.keys()
    engine = {each.name for each in dataclasses.fields(Sampling)} - {"logit_bias"}
    assert SamplingDefaults.model_fields.keys() == engine | {"max_tokens"}


def test_overrides_replace_only_what_they_name() -> None:
    changed = SamplingDefaults(seed=1).with_overrides({"temperature": "0.2", "max_tokens": 5, "seed": None})
    assert changed == SamplingDefaults(temperature=0.2, max_tokens=5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"temperature": -1}, "temperature: should be greater than or equal to 0, found -1"),
        ({"temperature": float("nan")}, "temperature: should be a finite number"),
        ({"top_p": 0}, "top_p: should be greater than 0"),
        ({"top_k": 1.5}, "top_k: should be a valid integer"),
        ({"max_tokens": 0}, "max_tokens: should be greater than or equal to 1"),
        ({"seed": 2**63}, "seed: should be less than"),
        ({"warmth": 1}, "there is no sampling setting 'warmth'"),
    ],
)
def test_an_override_that_makes_no_sense_is_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        SamplingDefaults().with_overrides(overrides)


def test_choices_know_what_was_chosen_even_when_it_is_nothing() -> None:
    assert SamplingChoices(seed=None, top_k=2).chosen_sampling() == {"top_k": 2, "seed": None}


def test_entities_do_not_load_the_engine() -> None:
    code = "import sys, synapse.personas.entities; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
