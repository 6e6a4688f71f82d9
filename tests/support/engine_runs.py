"""Driving an engine by hand, as a test reads best."""

from __future__ import annotations

from dataclasses import dataclass, field

from synapse.engines import Delta, Engine, Event, Finished, Request


@dataclass
class Answer:
    """What a request came to."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Delta):
            self.text += event.text
            self.tokens += event.tokens
        else:
            assert self.finished is None, "a request ends once"
            self.finished = event


def run(engine: Engine, *requests: Request) -> list[Answer]:
    """Add all requests at once and step until nothing is left."""
    answers = {engine.add(request): Answer() for request in requests}
    while engine.busy:
        for event in engine.step():
            answers[event.request_id].add(event)
    assert all(answer.finished for answer in answers.values())
    return list(answers.values())
