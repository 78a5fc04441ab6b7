"""Names of models: what is there, what is not, and what is said."""

import pytest

from llmrl import models
from llmrl.errors import RefusedError


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "gpt2"])
def test_hub_ids_pass_through(name):
    assert models.resolve(name) == name


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_folders_with_a_model_or_an_adapter(tmp_path, file):
    (tmp_path / file).write_text("{}")
    assert models.resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "name", ["/tmp/no_model_here", "./no_model_here", "../no_model_here", "a/b/no_model_here", "runs/no_model_here"]
)
def test_a_path_that_is_not_there_is_named(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefusedError, match=f"there is no folder {name}.*starter"):
        models.resolve(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(RefusedError, match=f"{tmp_path} holds no model"):
        models.resolve(str(tmp_path))


def test_a_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(RefusedError, match=r"model\.gguf is a file"):
        models.resolve(str(tmp_path / "model.gguf"))


def test_bundled_names_are_made_on_demand(monkeypatch, tmp_path):
    said = []
    monkeypatch.setitem(models.BUNDLED, "starter", lambda say: say("training") or tmp_path)
    assert models.resolve("starter", said.append) == str(tmp_path)
    assert said == ["training"]


def test_only_the_first_rank_speaks(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(models.BUNDLED, "starter", lambda say: say("training") or tmp_path)
    monkeypatch.setenv("RANK", "1")
    models.resolve("starter")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    models.resolve("starter")
    assert capsys.readouterr().out == "training\n"
