import subprocess
import sys

import pytest

from smalti.core.errors import UserError
from smalti.core.pipeline import Pipeline
from smalti.core.progress import Reporter
from smalti.core.recipe import load_recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def told(action, *arguments, **options):
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    return str(caught.value)


def test_another_recipe_changes_nothing_without_force(folder, recipe):
    folder.prepare(load_recipe(recipe))
    before = (folder / "recipe.yaml").read_bytes()
    other = load_recipe(recipe, ["seed=5", "tokenizer.quantizer.dim=3"])
    assert told(folder.prepare, other) == (
        f"{folder.path} holds a run of another recipe (seed: 0 there, 5 asked for; tokenizer.quantizer.dim: 4 there, "
        "3 asked for); choose another folder with --out, or --force to redo what depends on it"
    )
    assert (folder / "recipe.yaml").read_bytes() == before
    folder.prepare(other, force=True)
    assert load_recipe(folder.path) == other


def test_what_cannot_change_results_may_change(folder, recipe):
    """Neither the folder nor any stage sees another recipe; what is kept is the new one."""
    folder.prepare(load_recipe(recipe))
    quick = ("checkpoint_every=7", "log_every=3", "max_skipped=1", "trackers=[tensorboard]", "sharding=full")
    changes = [f"train.{model}.{option}" for model in ("tokenizer", "generator") for option in quick]
    words = ("summary=newer words", "source=a paper", "figures={FID: 2}")
    other = load_recipe(recipe, ["data.workers=3", "data.max_undecodable=5", *words, *changes])
    folder.prepare(other)
    assert load_recipe(folder.path) == other
    runs = (Context(folder, loaded, "cpu", Reporter(quiet=True)) for loaded in (load_recipe(recipe), other))
    before, after = (Pipeline(context).fingerprints for context in runs)
    assert before == after


def test_a_foreign_folder_is_left_alone(folder, recipe):
    folder.path.mkdir()
    (folder / "thesis.tex").write_text("do not overwrite")
    assert told(folder.prepare, load_recipe(recipe)).endswith(
        "is not empty and not a run folder: choose another with --out"
    )
    assert [path.name for path in folder.path.iterdir()] == ["thesis.tex"]


def test_a_file_is_not_a_folder(tmp_path, recipe):
    (tmp_path / "file").write_text("x")
    folder = RunFolder(tmp_path / "file")
    with pytest.raises(UserError, match="is a file; expected a folder for the run"), folder.locked():
        raise AssertionError


def test_an_unreadable_recipe_asks_for_force(folder, recipe):
    loaded = load_recipe(recipe)
    folder.prepare(loaded)
    (folder / "recipe.yaml").write_text("name: [")
    assert told(folder.prepare, loaded).endswith("; --force replaces it")
    folder.prepare(loaded, force=True)
    assert load_recipe(folder.path) == loaded
    (folder / "recipe.yaml").write_bytes(b"\xff")
    assert told(folder.prepare, loaded).endswith("; --force replaces it")
    folder.prepare(loaded, force=True)
    assert load_recipe(folder.path) == loaded


def test_one_process_at_a_time_and_kills_release(folder):
    code = (
        "import sys, time\nfrom smalti.core.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).locked():\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"another process is working in {folder.path}"), folder.locked():
            raise AssertionError
        other.kill()
    with folder.locked():
        assert (folder.state / "lock").exists()


@pytest.mark.parametrize("cut", ['{"stage": "one", "st', '{"stage": "one", "codebook_health": {"usage": [0.5]}'])
def test_metrics_rewind_to_a_step_and_drop_a_cut_line(folder, cut):
    folder.path.mkdir()
    for stage in ("one", "two"):
        for step in (2, 4, 6):
            folder.append_metrics({"stage": stage, "step": step, "loss": step / 3})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(cut)
    assert [line["step"] for line in folder.metrics("one")] == [2, 4, 6]
    folder.rewind_metrics("one", 4)
    assert [line["step"] for line in folder.metrics("one")] == [2, 4]
    assert [line["step"] for line in folder.metrics("two")] == [2, 4, 6]
    folder.append_metrics({"stage": "one", "step": 6, "loss": 1.0})
    assert [line["step"] for line in folder.metrics("one")] == [2, 4, 6]


@pytest.mark.parametrize("line", ["{}", "{x}", '{"stage": "one"}', '{"stage": 1, "step": 2}', "[[}", "\x80}"])
def test_damaged_metrics(folder, line):
    folder.path.mkdir()
    path = folder / "metrics.jsonl"
    path.write_bytes(b'{"stage": "one", "step": 1}\n' + line.encode("latin1") + b"\n")
    sentence = f"{path} is damaged, expected stage and step in line 2: remove that line"
    assert told(folder.metrics, "one") == sentence
    assert told(folder.rewind_metrics, "one", 5) == sentence


@pytest.mark.parametrize("content", ["null", "[1]", '{"tokenize": 3}', '"x"'])
def test_damaged_stages(folder, content):
    folder.state.mkdir(parents=True)
    path = folder.state / "stages.json"
    path.write_text(content)
    assert told(folder.stages) == (
        f"{path} is damaged, expected what is known of each stage: remove it to do all stages again"
    )
