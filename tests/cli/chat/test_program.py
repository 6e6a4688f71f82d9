from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.tiny_home import MODEL
from synapse.cli.chat import program as chat_module
from synapse.cli.chat import session as chat_session
from synapse.cli.main import main
from synapse.cli.text import left_out_notice
from synapse.personas.entities import MAX_MESSAGE_LENGTH

pytestmark = pytest.mark.usefixtures("persona_home")


class Keyboard(io.StringIO):
    """Standard input as somebody's terminal, with everything typed in advance."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def session(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `synapse chat` for a person who types these lines and then Ctrl-D; stdout is a pipe."""

    def run(*lines: str, args: tuple[str, ...] = (), name: str = "pip") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", Keyboard("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = main(["chat", name, *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_terminal_says_once_that_another_engine_answers_than_should(
    synapse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNAPSE_BACKEND", "auto")
    monkeypatch.setenv("SYNAPSE_FORCE_PYTHON", "1")  # whichever kernels other tests of this process have opened
    ran = synapse("chat", "pip", "-m", "hello")
    assert ran.code == 0
    assert ran.err.count("the reference engine answers") == 1
    assert "unset SYNAPSE_FORCE_PYTHON" in ran.err
    assert synapse("chat", "pip", "-m", "hello", "--json").err == ""


def test_one_message_prints_only_the_answer(synapse) -> None:
    ran = synapse("chat", "pip", "-m", "hello")
    assert (ran.code, ran.err) == (0, "")
    answer = json.loads(synapse("chat", "pip", "-m", "hello", "--json").out)
    assert ran.out == answer["content"] + "\n"


def test_json_tells_everything_about_the_answer(synapse) -> None:
    answer = json.loads(synapse("chat", "pip", "-m", "hello", "--json").out)
    assert answer["persona"] == "pip"
    assert answer["finish_reason"] == "length"
    assert answer["completion_tokens"] == 24
    assert answer["tokens_per_second"] > 0
    assert answer["left_out_messages"] == 0


def test_a_piped_message_and_one_that_follows_m(synapse) -> None:
    synapse("chat", "pip", stdin="from a pipe\n")
    synapse("chat", "pip", "-m", "look at this:", stdin="the file\n")
    said = [conversation_messages(synapse, row["id"])[0]["content"] for row in conversations(synapse)]
    assert said == ["look at this:\n\nthe file", "from a pipe"]


def conversations(synapse) -> list[dict[str, str]]:
    return json.loads(synapse("conversation", "list", "--json").out)["items"]


def conversation_messages(synapse, conversation_id: str) -> list[dict[str, str]]:
    return json.loads(synapse("conversation", "show", conversation_id, "--json").out)["said"]


def test_a_conversation_is_continued_by_its_id_or_as_the_latest_one(synapse) -> None:
    first = json.loads(synapse("chat", "pip", "-m", "one", "--json").out)
    second = json.loads(synapse("chat", "pip", "-m", "two", "--continue", "--json").out)
    third = json.loads(synapse("chat", "pip", "-m", "three", "--conversation", first["conversation_id"], "--json").out)
    assert first["conversation_id"] == second["conversation_id"] == third["conversation_id"]
    assert third["prompt_tokens"] > second["prompt_tokens"] > first["prompt_tokens"]
    assert synapse("chat", "pip", "-m", "x", "--conversation", "nonsense").code == 3


def test_sampling_is_changed_for_one_answer(synapse) -> None:
    changed = json.loads(synapse("chat", "pip", "-m", "hi", "--max-tokens", "3", "--seed", "7", "--json").out)
    assert changed["completion_tokens"] == 3
    ran = synapse("chat", "pip", "-m", "hi", "--temperature", "9")
    assert (ran.code, ran.err.split(",")[0]) == (2, "error: temperature: should be less than or equal to 2")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("pipp", "-m", "hi"), 3, "error: there is no persona or model called 'pipp'\nhint: did you mean pip?"),
        (("pip", "-m", ""), 2, "error: the message is empty"),
        (("pip", "--continue", "-m", "x"), 3, "error: pip has had no conversation yet"),
        (("pip", "-m", "x" * 9000), 2, "error: the message and the system prompt are 90"),
    ],
)
def test_what_cannot_be_answered_says_why(synapse, args: tuple[str, ...], code: int, message: str) -> None:
    ran = synapse("chat", *args)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(message)


def test_a_model_without_a_persona_can_be_talked_to_and_nothing_is_kept(synapse) -> None:
    answer = json.loads(synapse("chat", MODEL, "-m", "hello", "--max-tokens", "5", "--json").out)
    assert (answer["persona"], answer["conversation_id"], answer["completion_tokens"]) == (MODEL, None, 5)
    assert conversations(synapse) == []
    ran = synapse("chat", MODEL, "--continue", "-m", "hello")
    assert ran.code == 2
    assert "conversations are kept for personas only" in ran.err


def test_a_session_with_a_model_remembers_what_was_said(session, synapse) -> None:
    code, out, _ = session("hello", "again", "/history", "/new", "/history", args=("--max-tokens", "3"), name=MODEL)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("you> ")] == ["you> hello", "you> again"]
    assert conversations(synapse) == []


def test_bytes_that_are_no_text_are_refused_whatever_the_locale_says(persona_home: Path) -> None:
    command = [sys.executable, "-c", "import sys; from synapse.cli.main import main; sys.exit(main())"]
    for locale in ("C.UTF-8", "POSIX"):
        env = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        piped = subprocess.run(
            [*command, "chat", "pip", "--json"], input=b"caf\xe9", capture_output=True, env=env, check=False
        )
        assert (piped.returncode, json.loads(piped.stderr)["code"]) == (2, "not_text")
        typed = subprocess.run(
            [*command, "persona", "show", b"caf\xe9"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=env,
            check=False,
        )
        assert typed.returncode == 2
        assert b"is not UTF-8 text" in typed.stderr
        said = subprocess.run(
            [*command, "persona", "edit", "pip", "--description", "a caf\u00e9", "--json"],
            capture_output=True,
            env=env,
            check=False,
        )
        assert said.returncode == 0, said.stderr
        assert b"Traceback" not in said.stderr


def test_a_full_disk_is_said_and_is_no_defect(persona_home: Path) -> None:
    command = [sys.executable, "-c", "import sys; from synapse.cli.main import main; sys.exit(main())"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "persona", "list", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 5
    assert json.loads(done.stderr)["code"] == "disk_full"


def test_standard_input_has_a_limit(synapse) -> None:
    ran = synapse("chat", "pip", stdin="x" * (MAX_MESSAGE_LENGTH + 1))
    assert ran.code == 2
    assert "standard input has more than 1048576 characters" in ran.err


def test_json_without_a_message_is_refused(session) -> None:
    code, out, err = session(args=("--json",))
    assert (code, out) == (2, "")
    assert json.loads(err)["message"] == "--json needs a message"


def test_messages_that_were_left_out_are_told_on_stderr(synapse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNAPSE_MAX_CONTEXT", "512")
    synapse("chat", "pip", "-m", "y" * 200)
    synapse("chat", "pip", "-c", "-m", "y" * 200)
    ran = synapse("chat", "pip", "-c", "-m", "y" * 200)
    assert ran.err == left_out_notice(4) + "\n"
    ran = synapse("chat", "pip", "-c", "-m", "y" * 200, "--json")
    assert (json.loads(ran.out)["left_out_messages"], ran.err) == (6, "")


def test_the_first_chat_fetches_the_default_model_and_says_so(
    synapse, persona_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `tiny` is no name that can be pulled, so the attempt itself is what shows.
    model = next((persona_home / "models" / "tiny").glob("*.gguf"))
    kept = model.read_bytes()
    synapse("model", "rm", "tiny", "--force")
    ran = synapse("chat", "pip", "-m", "hi")
    assert ran.code == 3
    assert "the model tiny is not here yet; fetching it once …" in ran.err
    synapse("persona", "edit", "pip", "--description", "still here")
    monkeypatch.setenv("SYNAPSE_DEFAULT_MODEL", "smollm2-135m")
    ran = synapse("chat", "pip", "-m", "hi")
    assert (ran.code, "fetching" in ran.err) == (3, False)
    assert "hint: pull it" in ran.err
    model.parent.mkdir(exist_ok=True)
    model.write_bytes(kept)


def test_a_session_answers_every_line_and_tells_its_speed_beside(session) -> None:
    code, out, err = session("hello", "", "and again")
    assert code == 0
    assert out.count("\n") >= 2
    assert err.count("24 tokens · ") == 2
    assert "tokens/s" in err
    assert "reached its longest length" in err
    assert err.startswith("pip - a parrot\ntiny; /help lists the commands")
    assert err.count("you> ") == 4


def test_a_session_goes_on_with_a_conversation(session, synapse) -> None:
    session("the first words")
    code, out, err = session("/history", args=("--continue",))
    assert code == 0
    assert "going on with “the first words”" in err
    assert out.startswith("you> the first words\npip> ")


def test_the_slash_commands(session) -> None:
    code, out, err = session(
        *("/help", "/history", "/system", "/system Be brief.", "/system", "/set temperature = 0.2", "/set seed=none"),
        *("/set warmth=1", "/set temperature", "/set top_p=7", "/hlep", "/zzz", "/new", "/exit", "never said"),
    )
    assert code == 0
    assert "/system   show the system prompt" in out
    assert "nothing has been said yet" in err
    assert "\nYou are Pip.\nBe brief.\n" in out
    assert "set for this session" in err
    assert "temperature = 0.2 (this session)\n" in out
    assert "seed = null (this session)" in out
    assert "there is no sampling setting 'warmth'" in err
    assert "error: /set takes NAME=VALUE, not 'temperature'" in err
    assert "error: top_p: should be less than or equal to 1" in err
    assert "hint: did you mean /help?" in err
    assert "hint: the commands are /help, /new" in err
    assert "a new conversation begins" in err
    assert "never said" not in out


def test_new_begins_another_conversation_and_a_path_is_no_command(session, synapse) -> None:
    session("one", "/new", "/etc/passwd is a file")
    assert [row["title"] for row in conversations(synapse)] == ["/etc/passwd is a file", "one"]


def test_three_quotes_hold_a_message_of_several_lines(session, synapse) -> None:
    session('"""first', "second", '"""')
    [row] = conversations(synapse)
    assert conversation_messages(synapse, row["id"])[0]["content"] == "first\nsecond"


def test_an_error_in_a_session_does_not_end_it(session) -> None:
    code, _, err = session("x" * 9000, "hello")
    assert code == 0
    assert "error: the message and the system prompt are 90" in err
    assert "24 tokens · " in err


def test_left_out_messages_are_told_once_in_a_session(session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNAPSE_MAX_CONTEXT", "512")
    _, _, err = session(*["y" * 200] * 6)
    assert err.count("no longer fits the model's context") == 1


def interrupt_soon(after: Callable[[], bool]) -> threading.Thread:
    def run() -> None:
        deadline = time.monotonic() + 30
        while not after() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_ctrl_c_stops_the_answer_and_not_the_session(
    session, synapse, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for module in (chat_session, chat_module):
        monkeypatch.setattr(module, "write_answer", said.append)
    thread = interrupt_soon(lambda: len(said) > 20)
    code, _, err = session("/set max_tokens=7000", "/set temperature=0", "talk", "/set max_tokens=3", "again")
    thread.join()
    assert code == 0
    assert "stopped" in err
    assert "3 tokens · " in err
    [row] = conversations(synapse)
    messages = conversation_messages(synapse, row["id"])
    assert [message["finish_reason"] for message in messages] == [None, "cancelled", None, "length"]
    assert messages[1]["content"]


def test_ctrl_c_during_a_single_answer_leaves_with_130_and_keeps_what_was_said(
    synapse, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(chat_module, "write_answer", said.append)
    thread = interrupt_soon(lambda: len(said) > 20)
    ran = synapse("chat", "pip", "-m", "talk", "--max-tokens", "7000", "--temperature", "0")
    thread.join()
    assert ran.code == 130
    [row] = conversations(synapse)
    assert conversation_messages(synapse, row["id"])[1]["finish_reason"] == "cancelled"


def test_a_reader_that_leaves_stops_the_answer_quietly(persona_home: Path) -> None:
    command = [sys.executable, "-c", "import sys; from synapse.cli.main import main; sys.exit(main())"]
    args = ["chat", "pip", "-m", "talk", "--max-tokens", "7000", "--temperature", "0"]
    with subprocess.Popen(
        [*command, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) in (0, 1)
