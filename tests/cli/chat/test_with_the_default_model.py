from __future__ import annotations

import pytest


@pytest.mark.slow
@pytest.mark.usefixtures("default_model_home")
def test_a_persona_of_the_default_model_answers_a_question(synapse, native: bool) -> None:
    assert synapse("persona", "create", "guide", "--system-prompt", "Answer in one short sentence.").code == 0
    ran = synapse("chat", "guide", "-m", "What is the capital of France?", "--temperature", "0", "--max-tokens", "24")
    assert ran.code == 0
    assert not native or ran.err == ""
    assert "Paris" in ran.out
