"""What a user may write to say which model is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from synapse.errors import InvalidInput
from synapse.models.manifest import MANIFESTS, HubFile, LocalFile, check_model_name, name_of, parse_source


def test_a_file_on_the_hub_is_named_by_repository_and_path() -> None:
    assert parse_source("hf:Org/Repo-1.5/sub/Model.Q4_0.gguf") == HubFile("Org/Repo-1.5", "sub/Model.Q4_0.gguf")
    with_revision = parse_source("hf:org/repo@v1.0/model.gguf")
    assert with_revision == HubFile("org/repo", "model.gguf", "v1.0")
    assert str(with_revision) == "hf:org/repo@v1.0/model.gguf"


@pytest.mark.parametrize(
    "text",
    ["hf:", "hf:org", "hf:org/repo/model.bin", "hf:org/repo/../x.gguf", "hf:org//m.gguf", "hf:o/r/a b.gguf"],
)
def test_what_begins_like_the_hub_but_names_no_gguf_file_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="hub") as caught:
        parse_source(text)
    assert "hf:ORGANISATION/REPOSITORY/FILE.gguf" in (caught.value.hint or "")


def test_paths_are_told_from_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source("model.gguf") == LocalFile(tmp_path / "model.gguf")
    assert parse_source("./model") == LocalFile(tmp_path / "model")
    assert parse_source("no-such-model") is None
    (tmp_path / "a-file").touch()
    assert parse_source("a-file") == LocalFile(tmp_path / "a-file")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (LocalFile(Path("/x/My Model (v2).Q4_K_M.GGUF")), "my-model-v2-.q4_k_m"),
        (HubFile("org/repo", "sub/Qwen2.5-0.5B.gguf"), "qwen2.5-0.5b"),
        (LocalFile(Path("/x/模型.gguf")), "model"),
        (LocalFile(Path("/x/..gguf")), "model"),
    ],
)
def test_a_model_without_a_name_is_called_like_its_file(source: LocalFile | HubFile, name: str) -> None:
    assert name_of(source) == name
    assert check_model_name(name) == name


@pytest.mark.parametrize("name", ["", "UPPER", "../x", "a/b", ".hidden", "-rf", "a" * 65, "a b", "a\n"])
def test_names_that_could_be_paths_or_options_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="name for a model"):
        check_model_name(name)


def test_every_model_of_the_manifest_says_what_it_is_and_where_it_comes_from() -> None:
    for name, manifest in MANIFESTS.items():
        assert check_model_name(name) == manifest.name
        assert manifest.licence
        assert manifest.description
        for file in manifest.files:
            assert len(file.sha256) == 64
            assert file.size > 0
            assert file.sources
