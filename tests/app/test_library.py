"""What the page offers: models, runs and LoRAs, as their folders are now."""

import shutil

import pytest

from latentdiff.app.library import DEFAULT_MODEL, Library


def make_run(folder, model=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    if model is not None:
        shutil.copytree(model, folder / "pipeline")
    return folder


def test_without_a_model_the_one_that_ships_is_offered(tmp_path):
    assert Library().models() == {DEFAULT_MODEL: DEFAULT_MODEL}
    unfinished = make_run(tmp_path / "run")
    assert list(Library((str(unfinished),)).models()) == [DEFAULT_MODEL]
    assert Library((str(unfinished),)).runs() == {"run": unfinished}


def test_a_run_given_by_either_folder_is_a_model_and_a_run(tmp_path, model):
    run = make_run(tmp_path / "run", model)
    assert Library((str(run),)).models() == {"run": str(run)}
    exported = Library((str(run / "pipeline"),))
    assert exported.models() == {"run": str(run / "pipeline")}
    assert exported.runs() == {"run": run}


def test_runs_and_what_they_write_appear_while_the_page_is_open(tmp_path, model):
    library = Library((str(model),), runs_dir=tmp_path)
    assert (list(library.models()), library.runs()) == (["tiny"], {})
    run = make_run(tmp_path / "a")
    assert (list(library.models()), library.runs()) == (["tiny"], {"a": run})
    shutil.copytree(model, run / "pipeline")
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").touch()
    assert list(library.models()) == ["tiny", "a"]
    assert library.loras() == {"a (run)": run / "lora"}


def test_equal_names_are_told_apart_by_their_paths(tmp_path, model):
    for place in ("x", "y"):
        make_run(tmp_path / place / "run", model)
    library = Library((str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")))
    assert set(library.models()) == {str(tmp_path / place / "run") for place in ("x", "y")}


def test_loras_are_files_and_folders_of_their_directory(tmp_path):
    (tmp_path / "ink.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "chalk").mkdir()
    (tmp_path / "chalk" / "pytorch_lora_weights.safetensors").touch()
    assert list(Library(lora_dir=tmp_path).loras()) == ["ink", "chalk"]
    with pytest.raises(FileNotFoundError, match="lora_dir="):
        Library(lora_dir=tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="runs="):
        Library(runs_dir=tmp_path / "absent")
