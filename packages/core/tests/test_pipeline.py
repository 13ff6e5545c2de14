import json

import numpy as np
import pytest
import yaml
from PIL import Image

OUTPUTS = ("tokenizer", "tokens", "generator", "samples", "metrics.jsonl", "recipe.yaml")


def files(folder):
    """Every output file with its bytes."""
    found = {}
    for name in OUTPUTS:
        path = folder / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def test_the_whole_pipeline_by_one_command_and_by_five(smalti, tmp_path):
    """Also: the same seed gives the same files, and what is done is not done again."""
    done = smalti("run", "toy.yaml", "--out", "one")
    assert done.returncode == 0, done.stderr
    one = files(tmp_path / "one")
    for stage in (["train", "tokenizer"], ["tokenize"], ["train", "generator"], ["sample"], ["evaluate"]):
        smalti(*stage, "toy.yaml", "--out", "five", check=True)
    assert files(tmp_path / "five") == one
    again = smalti("run", "one", check=True)
    assert again.stderr.splitlines() == [
        f"{stage}: done before" for stage in ("train-tokenizer", "tokenize", "train-generator", "sample", "evaluate")
    ]
    samples = np.load(tmp_path / "one" / "samples" / "samples.npz")
    assert samples["arr_0"].shape == (12, 8, 8, 3)
    assert samples["arr_0"].dtype == np.uint8
    assert samples["arr_1"].tolist() == [0, 1, 2] * 4
    with Image.open(tmp_path / "one" / "samples" / "grid.png") as grid:
        assert grid.size[1] > grid.size[0]  # a row per class, two columns
    assert json.loads((tmp_path / "one" / "summary.json").read_text())["samples"] == 12
    layout = json.loads((tmp_path / "one" / "tokens" / "layout.json").read_text())
    assert [entry["samples"] for entry in layout["shards"]] == [10, 10, 4]
    assert layout["views"] == ["original", "flip"]


def test_a_changed_recipe_is_refused_and_force_redoes_what_depends_on_it(smalti, tmp_path):
    smalti("run", "toy.yaml", "--out", "run", check=True)
    before = files(tmp_path / "run")
    refused = smalti("run", "toy.yaml", "--out", "run", "sample.count=9")
    assert refused.returncode == 2
    assert refused.stderr.startswith("smalti: run holds a run of another recipe (sample.count: 12 there, 9 asked for);")
    assert files(tmp_path / "run") == before
    forced = smalti("run", "toy.yaml", "--out", "run", "sample.count=9", "--force", check=True)
    assert forced.stderr.splitlines()[:3] == [
        "train-tokenizer: done before",
        "tokenize: done before",
        "train-generator: done before",
    ]
    after = files(tmp_path / "run")
    assert after["tokenizer/model.safetensors"] == before["tokenizer/model.safetensors"]
    assert len(np.load(tmp_path / "run" / "samples" / "samples.npz")["arr_0"]) == 9


def test_seeds_differ(smalti, tmp_path):
    smalti("train", "tokenizer", "toy.yaml", "--out", "a", check=True)
    smalti("train", "tokenizer", "toy.yaml", "--out", "b", "--seed", "1", check=True)
    name = "tokenizer/model.safetensors"
    assert files(tmp_path / "a")[name] != files(tmp_path / "b")[name]


def test_a_stage_says_what_it_needs(smalti):
    done = smalti("sample", "toy.yaml", "--out", "run")
    assert done.returncode == 2
    assert done.stderr == "smalti: sample needs train-generator first: run `smalti train generator run`\n"


def test_a_recipe_without_evaluation(smalti):
    done = smalti("evaluate", "toy.yaml", "evaluate=null")
    assert done.returncode == 2
    assert done.stderr.startswith("smalti: the recipe has no section for 'evaluate'; its stages are train-tokenizer, ")


def test_debug_shows_where_a_mistake_was_found(smalti):
    assert "Traceback" not in smalti("run", "nowhere").stderr
    assert "Traceback" in smalti("--debug", "run", "nowhere").stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"data": {"train": {"name": "webdataset", "shards": "none/*.tar", "classes": 3}}},
            "no shard matches none/*.tar",
        ),
        (
            {"tokenizer": {"preprocessing": {"image_size": 6, "channels": 1, "fit": "pad"}}},
            "an image of 6x6 cannot be encoded",
        ),
    ],
)
def test_bad_input_is_one_line(smalti, recipe, content, change, sentence):
    for section, values in change.items():
        content[section] = {**content[section], **values}
    recipe.write_text(yaml.safe_dump(content))
    done = smalti("run", "toy.yaml", "--out", "run")
    assert done.returncode == 2
    assert done.stderr.startswith(f"smalti: {sentence}"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(autouse=True)
def written(recipe):
    """Every test finds toy.yaml in its folder."""
    return recipe


ONLY_THE_TOKENIZER = ("generator=null", "train.generator=null", "tokenize=null", "sample=null", "evaluate=null")


def test_a_recipe_that_ends_with_the_tokenizer(smalti, tmp_path):
    smalti("run", "toy.yaml", *ONLY_THE_TOKENIZER, "--out", "run", check=True)
    assert files(tmp_path / "run").keys() >= {"tokenizer/model.safetensors", "recipe.yaml"}
    assert not (tmp_path / "run" / "generator").exists()
    done = smalti("sample", "run")
    assert done.returncode == 2
    assert done.stderr == "smalti: the recipe has no section for 'sample'; its stages are train-tokenizer\n"
    done = smalti("run", "toy.yaml", *ONLY_THE_TOKENIZER[:-1], "--out", "other")
    assert done.returncode == 2
    assert "for which the recipe has no section; its stages before that are train-tokenizer" in done.stderr


def test_a_shrunken_copy(smalti, tmp_path):
    changes = ("train.tokenizer.losses=[{name: l1},{name: lpips}]", "tokenizer.preprocessing.image_size=16")
    done = smalti("train", "tokenizer", "toy.yaml", *changes, "--shrink", check=True)
    assert "shrunk: VGG16 is random" in done.stderr
    run = tmp_path / "runs" / "toy-shrunk"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recipe["name"], recipe["train"]["tokenizer"]["steps"]) == ("toy-shrunk", 4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["lpips"] > 0


def test_recipes_are_listed_and_printed(smalti):
    listed = smalti("recipes", check=True).stdout
    assert "llamagen-vq-ds16" in listed
    assert "rFID 2.19, rFID at 384 0.94, rFID at 512 0.7, PSNR 20.79; checkpoint llamagen-vq-ds16" in listed
