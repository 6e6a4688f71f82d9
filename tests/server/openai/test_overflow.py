"""A layer whose numbers overflow is named as people name it, on every way to an answer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from support.live_server import Live, running
from support.tiny_home import MODEL, build_tiny_home
from synapse.cli.main import main


def make_loud(home: Path, folder: Path) -> Path:
    """A copy of a layer of the home, with finite factors that no sum survives."""
    folder.mkdir()
    (source, *_) = (home / "layers").glob("*/adapter_model.safetensors")
    factors = {name: array * np.float32(1e30) for name, array in load_file(source).items()}
    save_file(factors, folder / source.name)
    (folder / "adapter_config.json").write_bytes(source.with_name("adapter_config.json").read_bytes())
    return folder


def said(live: Live, path: str, persona: str, *, stream: bool) -> dict[str, object]:
    with live.http() as client:
        messages = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {"prompt": "hello"}
        answer = client.post(path, json={"model": persona, "stream": stream, "max_tokens": 4, **messages})
    error: dict[str, object] = json.loads(answer.text.removeprefix("data: "))["error"]
    return error


def test_an_overflow_names_the_layers_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = build_tiny_home(tmp_path / "tiny").path
    with running(home, default_model=MODEL, backend="reference") as live:
        live.run_inside("layer/add", source=str(make_loud(home, tmp_path / "loud")), name="loud voice")
        live.command("persona/create", name="shouter", layers="loud voice")
        live.command("persona/create", name="both", layers="first:0.5,loud voice")
        for path in ("/v1/chat/completions", "/v1/completions"):
            for stream in (False, True):
                error = said(live, path, "shouter", stream=stream)
                assert error["code"] == "layers_overflow"
                assert "the layer loud voice (weight 1) makes the model's numbers overflow" in str(error["message"])
        assert "first (weight 0.5), loud voice (weight 1)" in str(said(live, path, "both", stream=False)["message"])

    monkeypatch.setenv("SYNAPSE_HOME", str(home))
    monkeypatch.setenv("SYNAPSE_BACKEND", "reference")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["chat", "both", "-m", "hello"]) == 6
    told = capsys.readouterr().err
    assert "first (weight 0.5), loud voice (weight 1)" in told
    assert "synapse persona edit NAME --layers" in told
