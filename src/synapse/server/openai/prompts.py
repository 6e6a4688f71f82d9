"""From a request body to what the engine is asked: persona, layers, prompt tokens and sampling."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from synapse.commands import Context
from synapse.daemon.host import open_models
from synapse.engines import EngineClient, FrontEnd, Request
from synapse.models.chat_template import Message
from synapse.personas.chat import TurnOptions, prepare_turn
from synapse.personas.events import TurnNews
from synapse.personas.layers import persona_stack
from synapse.server.catalogue import find_served
from synapse.server.http.errors import BadField
from synapse.server.openai.wire import ChatBody, CompletionBody


@dataclass(frozen=True, slots=True)
class Prepared:
    """Requests for one engine: for each prompt as many as it has choices, side by side.

    `news` publishes how a turn of a persona ends; bare completions are none.
    """

    client: EngineClient
    requests: tuple[Request, ...]
    news: TurnNews | None = None


async def prepare_chat(context: Context, body: ChatBody) -> Prepared:
    """A turn of the persona, with one request for each choice. Nothing is left out of a history that is too long.

    Raises:
        UnknownModel: no persona and no pulled model has this name.
        ContextOverflow, InvalidInput, LayerRefused, Corrupt: see `prepare_turn`.
    """
    persona = (await find_served(context, body.model)).persona
    overrides = body.sampling_overrides()
    bias = overrides.pop("logit_bias", {})
    if body.token_limit is not None:
        overrides["max_tokens"] = body.token_limit
    options = TurnOptions(
        sampling=overrides,
        stop=body.stops,
        logprobs=body.alternatives,
        logit_bias=bias,
        grammar=body.response_format.grammar() if body.response_format else None,
        trim=False,
        tract=body.tract,
    )
    messages = [Message("system" if m.role == "developer" else m.role, m.text) for m in body.messages]
    turn = await prepare_turn(context, persona, messages, options)
    request = turn.request if body.token_limit is not None else _within_context(turn.request, turn.client.front)
    return Prepared(turn.client, with_seeds(request, body.choices), turn.news)


async def prepare_completions(context: Context, body: CompletionBody) -> Prepared:
    """One request for each choice of each prompt, with the persona's layers and sampling but no chat template.

    Raises:
        UnknownModel: no persona and no pulled model has this name.
        BadField: a prompt is empty and the model has no token to begin with.
        InvalidInput, LayerRefused, Corrupt: a setting or a layer cannot be used.
    """
    persona = (await find_served(context, body.model)).persona
    overrides = body.sampling_overrides()
    bias = overrides.pop("logit_bias", {})
    settings = persona.sampling.with_overrides(overrides)
    client = await (await context.get(open_models)).get(persona.base_model)
    stack = await persona_stack(context, persona)
    for sha256, _ in stack:
        await client.load_layer(sha256)
    template = Request(
        prompt=(),
        layers=stack,
        sampling=settings.to_sampling(bias),
        max_tokens=body.max_tokens or settings.max_tokens,
        stop=body.stops,
        logprobs=body.logprobs,
        tract=body.tract,
    )
    requests: list[Request] = []
    for prompt in await asyncio.to_thread(encode_prompts, client.front, body.prompts):
        request = replace(template, prompt=prompt)
        if body.max_tokens is None:
            request = _within_context(request, client.front)
        requests += with_seeds(request, body.choices)
    return Prepared(client, tuple(requests))


def encode_prompts(front: FrontEnd, prompts: Sequence[str | list[int]]) -> list[tuple[int, ...]]:
    """The tokens of each prompt.

    Text is read as `FrontEnd.encode_text` does; tokens stay as they are.

    Raises:
        BadField: a prompt has no token at all.
    """
    encoded = []
    for prompt in prompts:
        tokens = front.encode_text(prompt) if isinstance(prompt, str) else tuple(prompt)
        if not tokens:
            raise BadField("the prompt is empty", hint="send at least one character", param="prompt")
        encoded.append(tokens)
    return encoded


def with_seeds(request: Request, choices: int) -> tuple[Request, ...]:
    """The request once for each choice; with a seed, choice i gets seed + i."""
    seed = request.sampling.seed
    if seed is None:
        return (request,) * choices
    return tuple(replace(request, sampling=replace(request.sampling, seed=seed + i)) for i in range(choices))


def _within_context(request: Request, front: FrontEnd) -> Request:
    """Cut a persona's own limit on tokens to what the context still holds: the client did not ask for it."""
    room = front.context - len(request.prompt)
    if request.max_tokens is None or request.max_tokens <= room or room < 1:
        return request
    return replace(request, max_tokens=room)
