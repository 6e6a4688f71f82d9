"""Running the command line inside the test's process, and commands made for tests in the real registry."""

from __future__ import annotations

import enum
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, field_validator

from support.tiny_home import MODEL, TinyHome, build_tiny_home
from synapse import errors
from synapse.cli.main import main
from synapse.commands import Argument, Call, Context, Group, command, registry


@dataclass(frozen=True)
class Ran:
    """What a run of the program left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def synapse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs `synapse ARGS…` in this process, with nothing (or `stdin`) on standard input."""

    def run(*args: str | Path, stdin: str = "") -> Ran:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> TinyHome:
    return build_tiny_home(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def persona_home(
    tiny_home: TinyHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synapse: Callable[..., Ran]
) -> Path:
    """A home with the persona `pip`, who says at most 24 tokens of nonsense and wears a layer."""
    home = tiny_home.copy(tmp_path / "tiny-home")
    monkeypatch.setenv("SYNAPSE_HOME", str(home))
    monkeypatch.setenv("SYNAPSE_DEFAULT_MODEL", MODEL)
    monkeypatch.setenv("SYNAPSE_BACKEND", "reference")
    made = synapse(
        *("persona", "create", "pip", "--description", "a parrot", "--system-prompt", "You are Pip."),
        *("--layers", "first:0.5", "--max-tokens", "24", "--seed", "1"),
    )
    assert made.code == 0, made.err
    return home


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inner(BaseModel):
    weight: float = Field(ge=0, le=1)


class Sample(BaseModel):
    name: Annotated[str, Argument()] = Field(description="what it is called", min_length=2)
    files: Annotated[list[Path], Argument()] = Field(default_factory=list, description="files to read")
    count: int = Field(3, ge=1, le=9, description="how many [of them]")
    ratio: float | None = Field(None, description="a share")
    colour: Colour = Field(Colour.RED, description="its colour")
    mode: Literal["fast", "slow"] = "fast"
    tags: list[str] = Field(default_factory=list, description="words for it")
    loud: bool = Field(False, description="in capitals")
    polite: bool = Field(True, description="with a greeting")
    data: dict[str, Any] = Field(default_factory=dict, description="anything")
    inner: Inner | None = None
    inners: list[Inner] = Field(default_factory=list)

    @field_validator("tags")
    @classmethod
    def _no_spaces(cls, tags: list[str]) -> list[str]:
        if any(" " in tag for tag in tags):
            raise ValueError("a tag is one word")
        return tags


class Nothing(BaseModel):
    pass


class Row(BaseModel):
    name: str
    size_bytes: int
    note: str | None = None


class Rows(BaseModel):
    items: list[Row]


class Kind(BaseModel):
    kind: Annotated[str, Argument()]


@pytest.fixture
def sample_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group `sample`, whose commands echo, list, fail and report progress."""
    monkeypatch.setattr(registry, "_commands", dict(registry._commands))
    monkeypatch.setitem(registry.GROUPS, "sample", Group("synapse.errors", "Commands made for tests."))

    @command("sample/echo", permission="read")
    async def echo(params: Sample, context: Context) -> Sample:
        """Give back what was given.

        The description [of the command] is longer.
        """
        return params

    @command("sample/list", permission="read")
    async def list_rows(params: Nothing, context: Context) -> Rows:
        """List two rows."""
        return Rows(items=[Row(name="first", size_bytes=1536), Row(name="second", size_bytes=144811968)])

    @command("sample/empty", permission="read")
    async def empty(params: Nothing, context: Context) -> Rows:
        """List nothing."""
        return Rows(items=[])

    @command("sample/fail", permission="read")
    async def fail(params: Kind, context: Context) -> Nothing:
        """Fail in the way that is asked for."""
        kind = getattr(errors, params.kind, None)
        if kind is None:
            raise RuntimeError(f"no such kind: {params.kind}")
        raise kind("it is\nnot right\x1b[31m", hint="mend it")

    @command("sample/work", permission="read")
    async def work(params: Nothing, context: Context, call: Call) -> Nothing:
        """Report progress."""
        for done in range(5):
            call.progress("working", done, 4)
        call.progress("counting", 7, None)
        return Nothing()
