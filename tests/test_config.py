"""Settings come from the environment, then synapse.toml, then defaults; a wrong one is named."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from synapse.config import default_home, load_settings, unknown_variables
from synapse.errors import InvalidInput, Unavailable

ROOT = Path(__file__).parents[1]


def write_toml(home: Path, text: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    (home / "synapse.toml").write_text(text)


def test_the_home_is_the_platform_data_folder_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SYNAPSE_HOME")
    assert load_settings().home == default_home()
    monkeypatch.setenv("SYNAPSE_HOME", str(tmp_path / "elsewhere"))
    assert load_settings().home == tmp_path / "elsewhere"


def test_the_environment_goes_before_the_file_and_the_file_before_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    assert load_settings().max_batch == 16
    write_toml(home, "max_batch = 3\nport = 9000\n")
    assert (load_settings().max_batch, load_settings().port) == (3, 9000)
    monkeypatch.setenv("SYNAPSE_MAX_BATCH", "5")
    assert (load_settings().max_batch, load_settings().port) == (5, 9000)


@pytest.mark.parametrize(("name", "value"), [("PORT", "70000"), ("MAX_BATCH", "zero"), ("THREADS", "-1")])
def test_a_value_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"SYNAPSE_{name}", value)
    with pytest.raises(InvalidInput, match=f"{name.lower()} is '{value}'") as refused:
        load_settings()
    assert f"SYNAPSE_{name}" in (refused.value.hint or "")


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    write_toml(tmp_path / "home", "max_batch = = 3")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_settings()


def test_folders_are_private_to_the_user() -> None:
    folder = load_settings().folder("layers")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_a_home_that_cannot_be_made_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SYNAPSE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(Unavailable, match="cannot create") as refused:
        load_settings().folder("models")
    assert "SYNAPSE_HOME" in (refused.value.hint or "")


def test_the_database_is_in_the_home_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_settings().database == f"sqlite+aiosqlite:///{tmp_path / 'home' / 'synapse.db'}"
    monkeypatch.setenv("SYNAPSE_DATABASE_URL", "postgresql://localhost/synapse")
    assert load_settings().database == "postgresql://localhost/synapse"


def test_a_typing_mistake_in_the_file_is_named_with_the_nearest_setting(tmp_path: Path) -> None:
    write_toml(tmp_path / "home", "max_bach = 3\n")
    with pytest.raises(InvalidInput, match="no setting 'max_bach'") as refused:
        load_settings()
    assert refused.value.hint == "did you mean `max_batch`?"
    write_toml(tmp_path / "home", "[colour]\nsky = 'blue'\n")
    with pytest.raises(InvalidInput, match="no setting 'colour'") as refused:
        load_settings()
    assert "default_model" in (refused.value.hint or "")


def test_a_typing_mistake_in_a_variable_is_named_with_the_nearest_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNAPSE_MAXBATCH", "3")
    with pytest.raises(InvalidInput, match="no setting SYNAPSE_MAXBATCH") as refused:
        load_settings()
    assert "SYNAPSE_MAX_BATCH?" in (refused.value.hint or "")


def test_a_variable_that_resembles_no_setting_may_be_another_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNAPSE_REPORT_STATS", "yes")
    assert load_settings().port == 8377
    assert unknown_variables(os.environ) == ["SYNAPSE_REPORT_STATS"]


def test_every_variable_that_the_code_and_the_docs_speak_of_is_known() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    files = [path for room in ("src", "benchmarks", "scripts") for path in (ROOT / room).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*pages, *files])
    spoken_of = set(re.findall(r"(?<![A-Z_])SYNAPSE_[A-Z_]*[A-Z]", text)) - {"SYNAPSE_NAME"}  # stands for a name
    assert len(spoken_of) > 10
    assert unknown_variables(dict.fromkeys(spoken_of, "")) == []
