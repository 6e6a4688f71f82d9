from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from synapse import __version__

SYNAPSE = [sys.executable, "-c", "import sys; from synapse.cli.main import main; sys.exit(main())"]


def run_process(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [*SYNAPSE, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **env})


def test_the_help_names_every_group_and_program(synapse) -> None:
    ran = synapse("--help")
    assert ran.code == 0
    for name in ("persona", "layer", "model", "data", "chat", "demo", "up"):
        assert f"\n  {name} " in ran.out
    assert "Groups:" in ran.out
    assert "\x1b" not in ran.out


def test_no_arguments_show_the_help(synapse) -> None:
    assert synapse() == synapse("--help")


def test_the_help_imports_no_room_and_no_heavy_library() -> None:
    code = (
        "import sys; from synapse.cli.main import main; main(['--help']);"
        "heavy = {'pydantic', 'numpy', 'sqlalchemy', 'asyncio', 'fastapi', 'rich', 'synapse.commands'};"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"


def test_version_as_an_option_as_a_command_and_as_json(synapse) -> None:
    assert synapse("--version").out == f"synapse {__version__}\n"
    assert f"synapse {__version__}" in synapse("version").out
    assert json.loads(synapse("version", "--json").out)["synapse"] == __version__


def test_a_mistyped_group_names_the_nearest_one(synapse) -> None:
    ran = synapse("perona", "list")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: synapse has no command 'perona'\nhint: did you mean `synapse persona`?\n"


def test_a_command_that_resembles_nothing_lists_what_there_is(synapse) -> None:
    ran = synapse("qqqq")
    assert ran.code == 2
    assert "hint: there are chat, demo, up, down, status, ps, version, model, " in ran.err


@pytest.mark.usefixtures("sample_group")
class TestErrors:
    def test_a_mistyped_verb_names_the_nearest_one(self, synapse) -> None:
        ran = synapse("sample", "ecko")
        assert ran.code == 2
        assert "did you mean `synapse sample echo`?" in ran.err

    def test_a_mistyped_option_names_the_nearest_one(self, synapse) -> None:
        ran = synapse("sample", "echo", "ab", "--cuont", "3")
        assert ran.code == 2
        assert ran.err.startswith("error: synapse sample echo has no option --cuont\nhint: did you mean --count")

    def test_a_missing_argument_is_named(self, synapse) -> None:
        ran = synapse("sample", "echo")
        assert ran.code == 2
        assert ran.err == "error: missing argument 'NAME'\nhint: see `synapse sample echo --help`\n"

    @pytest.mark.parametrize(
        ("kind", "code"),
        [
            ("InternalError", 1),
            ("InvalidInput", 2),
            ("TooLarge", 2),
            ("NotFound", 3),
            ("Conflict", 4),
            ("Unavailable", 5),
            ("Corrupt", 6),
            ("Overloaded", 7),
            ("TimedOut", 7),
            ("Unauthorized", 8),
            ("Forbidden", 8),
        ],
    )
    def test_each_kind_of_error_has_its_exit_code_and_reads_as_one_line_and_a_hint(
        self, synapse, kind: str, code: int
    ) -> None:
        ran = synapse("sample", "fail", kind)
        assert ran.code == code
        assert ran.out == ""
        assert ran.err == "error: it is not right[31m\nhint: mend it\n"

    def test_with_json_an_error_is_one_object_on_stderr(self, synapse) -> None:
        ran = synapse("sample", "fail", "NotFound", "--json")
        assert (ran.code, ran.out) == (3, "")
        assert json.loads(ran.err) == {"code": "not_found", "message": "it is\nnot right\x1b[31m", "hint": "mend it"}

    def test_a_usage_error_is_json_too(self, synapse) -> None:
        ran = synapse("sample", "ecko", "--json")
        assert json.loads(ran.err)["code"] == "unknown_command"
        assert json.loads(synapse("sample", "echo", "--json").err)["code"] == "usage"

    def test_what_follows_two_dashes_is_not_an_option(self, synapse) -> None:
        assert synapse("sample", "fail", "--", "--json").err.startswith("error: ")

    def test_an_unforeseen_error_is_one_line_and_keeps_its_traceback_privately(self, synapse, tmp_path: Path) -> None:
        ran = synapse("sample", "fail", "Nonsense")
        assert ran.code == 1
        kept = tmp_path / "home" / "logs" / "last-error.txt"
        assert ran.err == (
            "error: something went wrong inside Synapse: RuntimeError: no such kind: Nonsense\n"
            f"hint: the traceback is in {kept}\n"
        )
        assert "Traceback" in kept.read_text()
        assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700

    def test_synapse_debug_prints_the_traceback(self, synapse, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SYNAPSE_DEBUG", "1")
        ran = synapse("sample", "fail", "Nonsense")
        assert ran.code == 1
        assert "Traceback (most recent call last)" in ran.err

    def test_a_home_that_cannot_be_written_still_says_what_to_do(
        self, synapse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SYNAPSE_HOME", str(tmp_path / "file"))
        assert "SYNAPSE_DEBUG=1" in synapse("sample", "fail", "Nonsense").err

    def test_a_setting_that_does_not_fit_is_an_input_error(self, synapse, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SYNAPSE_PORT", "many")
        ran = synapse("sample", "list")
        assert ran.code == 2
        assert "SYNAPSE_PORT" in ran.err


@pytest.mark.parametrize("args", [["--help"], ["version"], ["version", "--json"], ["--version"]])
def test_a_reader_that_has_stopped_reading_is_no_error(args: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([*SYNAPSE, *args], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(writer)
    assert done.stderr == b""
    assert done.returncode in (0, 1)


def test_completion_knows_the_names_of_what_is_in_the_home(persona_home: Path) -> None:
    def completed(line: str) -> list[str]:
        words = line.split(" ")
        return run_process(
            _SYNAPSE_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1)
        ).stdout.split()

    assert completed("synapse persona show p") == ["pip"]
    assert completed("synapse persona create p") == []
    assert completed("synapse chat ") == ["pip", "tiny"]
    assert completed("synapse persona edit pip --model t") == ["tiny"]
    assert completed("synapse persona edit pip --layers first:0.5,s") == ["first:0.5,second"]


def test_completion_lists_groups_and_gives_its_script() -> None:
    done = run_process(_SYNAPSE_COMPLETE="complete_bash", COMP_WORDS="synapse per", COMP_CWORD="1")
    assert done.stdout.split() == ["persona"]
    assert "_SYNAPSE_COMPLETE=complete_bash" in run_process(_SYNAPSE_COMPLETE="source_bash").stdout


def test_one_argument_too_many_and_a_nearly_right_model_are_told_in_plain_words(synapse) -> None:
    spoken = synapse("chat", "pip", "hello", "there")
    assert spoken.code == 2
    assert "synapse chat takes no further argument, found 'hello there'" in spoken.err
    assert 'say something with -m "hello there"' in spoken.err
    assert "quote what has spaces" in synapse("persona", "delete", "pip", "too").err
    assert "did you mean smollm2-135m?" in synapse("model", "pull", "Smollm2-135m").err
