from __future__ import annotations

import asyncio

import pytest

from synapse.commands import Context
from synapse.engines import ContextOverflow, EngineClient, open_engines
from synapse.errors import InvalidInput, NotFound
from synapse.models.chat_template import Message
from synapse.personas.chat import TextDelta, Turn, TurnFinished, TurnOptions, chat, prepare_turn, run_turn
from synapse.personas.commands import CreatePersona, create_persona
from synapse.personas.entities import Persona
from synapse.personas.lookup import find_persona
from synapse.store import Store

HELLO = [Message("user", "hello")]


async def answer(
    context: Context, persona: Persona, messages: list[Message] = HELLO, **options: object
) -> tuple[str, TurnFinished]:
    events = [event async for event in chat(context, persona, messages, TurnOptions(**options))]
    assert isinstance(events[-1], TurnFinished)
    assert all(isinstance(event, TextDelta) and event.text for event in events[:-1])
    return "".join(event.text for event in events[:-1]), events[-1]


async def idle(client: EngineClient) -> None:
    for _ in range(500):
        stats = await client.stats()
        if not (stats.active or stats.running or stats.waiting or stats.kv_tokens_held):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the engine is still busy: {await client.stats()}")


async def test_an_answer_comes_in_pieces_and_ends_with_its_counts(context: Context, persona: Persona) -> None:
    text, end = await answer(context, persona)
    assert text
    assert end.reason == "length"
    assert end.completion_tokens == 24
    assert end.prompt_tokens > 0
    assert end.tokens_per_second == pytest.approx(24 / end.seconds)


async def test_a_persona_with_a_seed_repeats_itself_and_another_seed_changes_what_it_says(
    context: Context, persona: Persona
) -> None:
    first, _ = await answer(context, persona)
    again, _ = await answer(context, persona)
    other, _ = await answer(context, persona, sampling={"seed": 2})
    assert first == again != other


async def test_the_system_prompt_and_the_history_reach_the_model(context: Context, persona: Persona) -> None:
    messages = [Message("user", "one"), Message("assistant", "two"), Message("user", "three")]
    turn = await prepare_turn(context, persona, messages)
    prompt = turn.client.front.tokenizer.decode(turn.request.prompt)
    places = [prompt.index(text) for text in ("You are Pip.", "one", "two", "three")]
    assert places == sorted(places)


async def test_the_layers_of_the_genome_are_loaded_with_their_weights(
    context: Context, store: Store, persona: Persona
) -> None:
    await create_persona(CreatePersona(name="both", layers="second,first:0.25"), context)
    await create_persona(CreatePersona(name="none", layers="first:0"), context)
    one = (await prepare_turn(context, persona, HELLO)).request.layers
    both = (await prepare_turn(context, await find_persona(store, "both"), HELLO)).request.layers
    none = (await prepare_turn(context, await find_persona(store, "none"), HELLO)).request.layers
    assert [weight for _, weight in one] == [0.5]
    assert [weight for _, weight in both] == [1.0, 0.25]
    assert both[1][0] == one[0][0] != both[0][0]
    assert none == ()


async def test_layers_change_what_is_said(context: Context, persona: Persona) -> None:
    plain, _ = await answer(context, persona, stack=(), sampling={"temperature": 0})
    layered, _ = await answer(context, persona, sampling={"temperature": 0})
    assert plain != layered


async def test_stop_strings_logprobs_and_bias_reach_the_engine(context: Context, persona: Persona) -> None:
    options = TurnOptions(stop=("x",), logprobs=2, logit_bias={70: 100.0})
    request = (await prepare_turn(context, persona, HELLO, options)).request
    assert (request.stop, request.logprobs, request.sampling.logit_bias) == (("x",), 2, {70: 100.0})
    assert request.max_tokens == 24


async def test_leaving_an_answer_early_frees_the_engine(context: Context, persona: Persona) -> None:
    turn = await prepare_turn(context, persona, HELLO, TurnOptions(sampling={"max_tokens": 900}))
    events = run_turn(turn)
    await anext(events)
    await events.aclose()
    await idle(turn.client)


async def test_cancelling_the_task_that_reads_an_answer_frees_the_engine(context: Context, persona: Persona) -> None:
    task = asyncio.create_task(answer(context, persona, sampling={"max_tokens": 900}))
    client = await (await context.get(open_engines)).get(persona.base_model)
    while not (await client.stats()).running:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(client)


async def test_turns_that_no_longer_fit_are_left_out_and_counted(context: Context, persona: Persona) -> None:
    said = [Message(role, role[0] * 300) for _ in range(4) for role in ("user", "assistant")]
    turn = await prepare_turn(context, persona, [*said, Message("user", "and now?")])
    prompt = turn.client.front.tokenizer.decode(turn.request.prompt)
    assert turn.left_out == 8
    assert "You are Pip." in prompt
    assert "and now?" in prompt
    assert len(turn.request.prompt) <= 1024 - 256


async def test_without_trimming_a_history_that_is_too_long_is_refused(context: Context, persona: Persona) -> None:
    with pytest.raises(ContextOverflow):
        await answer(context, persona, [Message("user", "x" * 2000)], trim=False)


async def test_one_message_that_does_not_fit_is_refused_with_its_length(context: Context, persona: Persona) -> None:
    with pytest.raises(ContextOverflow, match=r"are 20\d\d tokens long, and this model's context is 1024"):
        await prepare_turn(context, persona, [Message("user", "x" * 2000)])


async def test_a_limit_on_tokens_is_cut_to_what_the_context_holds(context: Context, persona: Persona) -> None:
    options = TurnOptions(sampling={"max_tokens": 5000})
    turn = await prepare_turn(context, persona, HELLO, options)
    assert turn.request.max_tokens == 1024 - len(turn.request.prompt)


async def test_a_setting_out_of_range_and_a_missing_model_are_refused(context: Context, persona: Persona) -> None:
    with pytest.raises(InvalidInput, match="temperature"):
        await prepare_turn(context, persona, HELLO, TurnOptions(sampling={"temperature": 9}))
    with pytest.raises(NotFound, match="no model 'elsewhere'"):
        await prepare_turn(context, persona.model_copy(update={"base_model": "elsewhere"}), HELLO)


async def test_different_personas_share_one_batch(context: Context, store: Store, persona: Persona) -> None:
    await create_persona(CreatePersona(name="other", layers="second", max_tokens=24, seed=1), context)
    other = await find_persona(store, "other")
    alone = [await answer(context, persona), await answer(context, other)]
    client = await (await context.get(open_engines)).get(persona.base_model)
    steps = (await client.stats()).counters.steps
    turns = [await prepare_turn(context, each, HELLO) for each in (persona, other)]

    async def text_of(turn: Turn) -> str:
        return "".join([event.text async for event in run_turn(turn) if isinstance(event, TextDelta)])

    together = await asyncio.gather(*map(text_of, turns))
    assert together == [text for text, _ in alone]
    assert (await client.stats()).counters.steps - steps < 40
