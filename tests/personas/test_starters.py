from __future__ import annotations

from synapse.genome.sources import starter_names
from synapse.personas.entities import Persona
from synapse.personas.sampling import SamplingDefaults
from synapse.personas.starters import load_starters


def test_every_starter_layer_has_a_persona_that_could_be_made() -> None:
    starters = load_starters()
    assert sorted(starter.layer for starter in starters.personas) == starter_names()
    assert starters.question
    for starter in starters.personas:
        sampling = SamplingDefaults().with_overrides(starter.sampling.chosen_sampling())
        persona = Persona(name=starter.name, description=starter.description, base_model="m", sampling=sampling)
        assert persona.name == starter.name
