"""Work in a process of the lowest priority: what it returns and raises, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from support.tiny_models import build_tiny_model
from synapse.commands import Context
from synapse.config import Settings
from synapse.engines import open_engines
from synapse.engines.background import NICENESS, Background
from synapse.engines.native.packed.file import open_packed, packed_size, prepare_packed
from synapse.engines.native.packed.source_hash import source_sha256
from synapse.errors import NotFound, Unavailable
from synapse.models.gguf_file import open_model_file
from synapse.models.head import read_head


async def test_it_is_another_process_of_low_priority_and_does_one_thing_after_another() -> None:
    async with Background() as background:
        process = await background.run(os.getpid)
        assert process != os.getpid()
        lowest = min(os.getpriority(os.PRIO_PROCESS, 0) + NICENESS, 19)
        assert await background.run(partial(os.getpriority, os.PRIO_PROCESS, 0)) == lowest
        assert await background.run(partial(sum, [1, 2, 3])) == 6
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


async def test_what_the_work_raises_is_raised_here(tmp_path: Path) -> None:
    async with Background() as background:
        with pytest.raises(NotFound, match=r"nowhere\.gguf"):
            await background.run(partial(source_sha256, tmp_path / "nowhere.gguf", tmp_path))
        assert await background.run(partial(int, "7")) == 7


async def test_a_process_that_dies_is_an_error_that_says_how() -> None:
    async with Background() as background:
        with pytest.raises(Unavailable, match="ended with SIGKILL"):
            await background.run(partial(signal.raise_signal, signal.SIGKILL))
        with pytest.raises(Unavailable, match="ended with SIGKILL"):
            await background.run(os.getpid)


async def test_whoever_gives_up_leaves_no_process_behind() -> None:
    async with Background() as background:
        process = await background.run(os.getpid)
        waiting = asyncio.create_task(background.run(signal.pause))
        await asyncio.sleep(0)
        waiting.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


async def test_where_no_process_can_be_started_the_work_is_done_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    async with Background() as background:
        assert await background.run(os.getpid) == os.getpid()


async def test_a_head_that_was_read_elsewhere_makes_the_same_tokenizer(tmp_path: Path) -> None:
    for kind in ("llama", "qwen2"):
        path = build_tiny_model(tmp_path / f"{kind}.gguf", kind).path
        here = read_head(path)
        async with Background() as background:
            there = await background.run(partial(read_head, path))
        assert (there.config, there.shapes, there.types) == (here.config, here.shapes, here.types)
        assert there.chat_template == here.chat_template
        first, second = here.tokenizer.build(), there.tokenizer.build()
        assert first.to_json() == second.to_json()
        assert [first.token_bytes(i) for i in range(first.vocab_size)] == [
            second.token_bytes(i) for i in range(second.vocab_size)
        ]
        assert there.file().tensor("token_embd.weight").shape == here.file().tensor("token_embd.weight").shape


async def test_what_was_packed_elsewhere_is_mapped_here_and_checked_again_once_it_looks_otherwise(
    tmp_path: Path,
) -> None:
    path = build_tiny_model(tmp_path / "tiny.gguf", "llama", storage="Q8_0").path
    sha256, folder = source_sha256(path, tmp_path), tmp_path / "packed"
    async with Background() as background:
        checked = await background.run(partial(prepare_packed, path, sha256, folder))
        assert await background.run(partial(prepare_packed, path, sha256, folder)) == checked
    head = read_head(path)
    packed = open_packed(head, sha256, folder, checked=checked)
    assert packed.bytes == packed_size(head)
    assert packed.checked == checked
    expected = packed.array("token_embd.weight").copy()
    (file,) = folder.glob("*.pack")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)  # damaged: the times tell, so it is read, and then made anew
    again = open_packed(head, sha256, folder, checked=checked)
    assert again.checked is not None
    assert again.checked.payload_sha256 == checked.payload_sha256
    assert (again.array("token_embd.weight") == expected).all()
    assert open_packed(open_model_file(path), sha256, folder).checked == again.checked


async def test_a_second_model_is_opened_with_its_help_while_the_first_is_in_use_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (str(build_tiny_model(tmp_path / f"{kind}.gguf", kind).path) for kind in ("llama", "qwen2"))
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\nkill -9 $$\n")
    dies.chmod(0o755)
    settings = Settings(home=tmp_path / "home", max_context=64, threads=1, backend="reference", keep_alive=-1)
    async with Context(settings) as context:
        host = await context.get(open_engines)
        client = await host.get(one)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(dies))
            with pytest.raises(Unavailable, match="ended with SIGKILL"):
                await host.get(two)
            assert [each.front.name for each in host.clients()] == [client.front.name]
        beside = await host.get(two)
        assert len(host.loaded) == 2
        assert beside.front.tokenizer.decode(beside.front.tokenizer.encode("a text")) == "a text"
