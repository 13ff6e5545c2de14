import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from smalti.core.captions import CaptionOptions, read_prompts
from smalti.core.class_names import class_names, read_classes
from smalti.core.cli import app
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.data.images import grid
from smalti.core.errors import UserError
from smalti.core.files import write_json
from smalti.core.options import GeneratorOptions
from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe, SampleSection
from smalti.core.run_folder import RunFolder
from smalti.core.sampling import run as sampling_run
from smalti.core.sampling.memory import SamplingMemory, free_memory, sampling_memory
from smalti.core.sampling.pretrained import sample_pretrained, section
from smalti.core.sampling.run import SamplingRun, chosen_classes
from smalti.core.sampling.trace import FRAMES, pictures, save_trace, shown_steps
from smalti.core.sampling_settings import SamplingSettings

NAMES = ("T-shirt/top", "Sneaker", "Bag")
QUIET = Reporter(quiet=True)


@pytest.fixture
def models(content) -> tuple[Tokenizer, Generator]:
    """An untrained tokenizer of 8 x 8 images and 2 x 2 tokens, and a table with a bit to learn of each class."""
    recipe = Recipe.model_validate(content)
    torch.manual_seed(0)
    tokenizer = recipe.tokenizer.build().eval()
    generator = recipe.generator.build(tokenizer.layout(), 3)
    torch.nn.init.normal_(generator.logits)
    return tokenizer, generator.eval()


@pytest.fixture
def run_with(models, tmp_path):
    """A `SamplingRun` in the folder `out` with these options, classes by `chosen_classes`."""

    def build(folder="out", **options) -> SamplingRun:
        chosen = SampleSection(**options)
        return SamplingRun(
            *models, chosen, chosen_classes(chosen.classes, 3, NAMES), tmp_path / folder, "cpu", names=NAMES
        )

    return build


def drawn(run: SamplingRun) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels."""
    run.draw(QUIET)
    with np.load(run.folder / "samples.npz") as archive:
        return archive["arr_0"], archive["arr_1"]


def test_classes_by_number_and_name():
    assert chosen_classes((), 3, NAMES) == (0, 1, 2)
    assert chosen_classes((2, "Sneaker", 1), 3, NAMES) == (2, 1)


def test_classes_of_the_command_line():
    assert read_classes("2, Sneaker,-1,") == [2, "Sneaker", -1]
    assert read_classes("T-shirt/top,no,010, ²") == ["T-shirt/top", "no", 10, "²"]


@pytest.mark.parametrize(
    ("wanted", "names", "sentence"),
    [
        (3, NAMES, "3 is out of range: there are 3 classes, 0 to 2"),
        (-1, NAMES, "-1 is out of range: there are 3 classes, 0 to 2"),
        ("sneakers", NAMES, "no class is called 'sneakers'; did you mean 'Sneaker'?"),
        ("kimono", NAMES, "no class is called 'kimono'; there are T-shirt/top, Sneaker, Bag"),
        (
            "Bag",
            (),
            "'Bag' is a name, and the names of the 3 classes are not known here: give numbers from 0 to 2",
        ),
    ],
)
def test_classes_that_there_are_not(wanted, names, sentence):
    with pytest.raises(UserError) as error:
        chosen_classes((wanted,), 3, names)
    assert str(error.value) == f"sample.classes: {sentence}"


def test_each_sample_is_the_same_whatever_the_batch_size(run_with):
    automatic, labels = drawn(run_with("a", count=10))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert len(np.unique(automatic, axis=0)) == 10
    for size in (1, 4, 10):
        images, _ = drawn(run_with(f"b{size}", count=10, batch_size=size))
        np.testing.assert_array_equal(images, automatic)


def test_a_count_per_class_and_files(run_with):
    options = {"classes": (2, "T-shirt/top"), "per_class": 6, "batch_size": 5}
    images, labels = drawn(run_with(**options, files="png"))
    assert labels.tolist() == [2, 0] * 6
    folder = run_with().folder / "images"
    assert sorted(path.name for path in folder.iterdir()) == ["0-T-shirt-top", "2-Bag"]
    files = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    assert [path.stem for path in files] == [f"{index:02d}" for index in range(12)]
    assert files[0].parent.name == "2-Bag"
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), images)
    drawn(run_with("webp", **options, files="webp"))
    with Image.open(run_with("webp").folder / "images" / "2-Bag" / "00.webp") as image:
        np.testing.assert_array_equal(np.asarray(image), images[0])


def test_a_restart_after_a_kill_while_chunks_are_removed(run_with, monkeypatch):
    whole, _ = drawn(run_with("whole", count=11, batch_size=4))

    def killed(folder):
        (folder / "batch_size.json").unlink()
        raise KeyboardInterrupt

    run = run_with(count=11)
    with monkeypatch.context() as patch:
        patch.setattr(sampling_run, "LARGEST_BATCH", 4)
        patch.setattr(sampling_run.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.draw(QUIET)
    monkeypatch.setattr(sampling_run, "LARGEST_BATCH", 2)
    again, _ = drawn(run)
    np.testing.assert_array_equal(again, whole)
    assert sorted(path.name for path in run.folder.iterdir()) == ["grid.png", "samples.npz"]


def test_a_restart_keeps_its_batch_size_and_what_is_there(run_with, monkeypatch):
    whole, _ = drawn(run_with("whole", count=11, batch_size=4))
    monkeypatch.setattr(sampling_run, "LARGEST_BATCH", 4)
    run = run_with(count=11)
    images = SamplingRun.images

    def killed(self, indices):
        if indices[0] == 8:
            raise KeyboardInterrupt
        return images(self, indices)

    monkeypatch.setattr(SamplingRun, "images", killed)
    with pytest.raises(KeyboardInterrupt):
        run.draw(QUIET)
    monkeypatch.setattr(sampling_run, "LARGEST_BATCH", 64)
    seen = []
    monkeypatch.setattr(
        SamplingRun, "images", lambda self, indices: seen.append(indices.tolist()) or images(self, indices)
    )
    np.testing.assert_array_equal(drawn(run)[0], whole)
    assert seen == [[8, 9, 10]]


def test_memory_does_not_grow_with_the_samples(run_with):
    def peak(count: int) -> int:
        tracemalloc.start()
        run_with(f"of{count}", count=count, batch_size=32).draw(QUIET)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(32)  # what is imported and cached at the first time
    assert peak(2048) < 1.5 * peak(256)


def test_a_grid_of_fewer_images_than_classes(run_with):
    drawn(run_with(count=2))
    with Image.open(run_with().folder / "grid.png") as image:
        assert image.size[1] > 1.5 * image.size[0]


class HungryOptions(GeneratorOptions):
    name: str = "hungry"

    def supports(self, layout):
        return None

    def build(self, layout, classes):
        return Hungry(self, layout, classes)


class Hungry(Generator):
    """Holds 1 MiB for any batch and 2 MiB for every image, at a time."""

    def loss(self, tokens, labels):
        return {}

    def sample(self, labels, settings, indices=None):
        kept = [torch.zeros(2**18), torch.zeros(len(labels), 2**18)]
        kept.append(kept[1] + 1)
        kept[1].view(-1).add_(1)  # neither a view nor a change in place is new memory
        return torch.zeros(len(labels), self.token_layout.positions, 1, dtype=torch.int64)


def test_peak_memory_is_predicted(models):
    tokenizer, _ = models
    memory = sampling_memory(Hungry(HungryOptions(), tokenizer.layout(), 3), tokenizer, SamplingSettings())
    assert memory.peak(16) == pytest.approx(33 * 2**20, rel=0.01)
    assert memory.weights == 4 * sum(parameter.numel() for parameter in tokenizer.parameters())


def test_a_batch_is_as_large_as_memory_allows():
    memory = SamplingMemory(0, ((100, 50), (0, 60)))
    assert (memory.peak(1), memory.peak(20)) == (150, 1200)
    assert memory.largest_batch(10_000, 64) == 64
    assert memory.largest_batch(2_000, 64) == 16
    with pytest.raises(
        UserError, match=r"^sampling 1 image needs about 1 MiB beside the weights, and 1 MiB of memory "
    ):
        memory.largest_batch(160, 64)


def test_a_batch_that_does_not_fit_is_told_before_the_run(run_with, monkeypatch):
    monkeypatch.setattr(sampling_run, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"^sampling 4 images at once needs .* may be used: give a smaller batch_size$"):
        run_with(count=8, batch_size=4).draw(QUIET)
    assert not list(run_with().folder.rglob("*.npy"))


def test_what_files_have_cached_is_free_in_a_container_too(tmp_path, monkeypatch):
    monkeypatch.setattr("smalti.core.sampling.memory.GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    everything = free_memory("cpu")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("990\n")
    (tmp_path / "memory.stat").write_text("anon 100\nfile 890\nshmem 90\ninactive_file 500\nactive_file 300\n")
    assert free_memory("cpu") == 810 < everything
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory("cpu") == 405


def test_captions_cannot_be_drawn(run_with):
    run = run_with()
    run.generator.captions = CaptionOptions()
    with pytest.raises(UserError, match=r"^the generator 'table' draws captions in the place of classes: give --gen"):
        run.draw(QUIET)


def test_a_trace_over_a_grid(run_with, tmp_path):
    run = run_with(count=3)
    tokens, steps = run.generator.sample_traced(torch.arange(3), run.settings)
    frames = pictures(run, tokens, steps)
    images = run.images(torch.arange(3)).numpy()
    assert len(frames) == 4
    np.testing.assert_array_equal(frames[-1], images)
    np.testing.assert_array_equal(frames[2][:, :4], images[:, :4])  # the first row of tokens
    np.testing.assert_array_equal(frames[2][:, 4:, :4], images[:, 4:, :4])
    assert (frames[2][:, 4:, 4:] == 128).all()
    save_trace(run, tmp_path / "trace.gif")
    with Image.open(tmp_path / "trace.gif") as animation:
        assert animation.n_frames == 4
        assert animation.size == grid(images, 3, 8).shape[1::-1]


def test_a_long_trace_is_shown_every_few_steps():
    steps = shown_steps(256)
    assert len(steps) == FRAMES
    assert (steps[0], steps[-1]) == (3, 255)
    assert shown_steps(3) == [0, 1, 2]


def test_saved_models_without_a_recipe(models, tmp_path, capsys):
    tokenizer, generator = models
    tokenizer.save_pretrained(tmp_path / "t")
    generator.save_pretrained(tmp_path / "g")
    paths = str(tmp_path / "g"), str(tmp_path / "t")
    sample_pretrained(*paths, section("2,0", ["sample.temperature=0.5"]), tmp_path / "out", "cpu", trace=True)
    with np.load(tmp_path / "out" / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [2, 0] * 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("grid.png", "samples.npz", "sampling.json", "state", "trace.gif"),
    }
    sample_pretrained(*paths, section("2,0", ["sample.temperature=0.5"]), tmp_path / "out", "cpu")
    assert "sample: done before" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"out holds other samples \(sample.classes: "):
        sample_pretrained(*paths, section("2", ["sample.temperature=0.5"]), tmp_path / "out", "cpu")
    with pytest.raises(UserError, match=r"t is not empty and holds no samples: choose another with --out$"):
        sample_pretrained(*paths, section("2", []), tmp_path / "t", "cpu")
    wider = replace_dim(tokenizer.options)
    wider.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"do not belong together: grid 2x2, 1 stream of 16 codes there, grid 2x2, 1 "):
        sample_pretrained(paths[0], str(tmp_path / "other"), section("", []), tmp_path / "new", "cpu")


def test_a_kill_before_the_grid_is_written_is_mended(models, tmp_path, monkeypatch):
    tokenizer, generator = models
    tokenizer.save_pretrained(tmp_path / "t")
    generator.save_pretrained(tmp_path / "g")
    arguments = (str(tmp_path / "g"), str(tmp_path / "t"), section("", []), tmp_path / "out", "cpu")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sampling_run, "save_grid", killed)
        with pytest.raises(KeyboardInterrupt):
            sample_pretrained(*arguments)
    before = (tmp_path / "out" / "samples.npz").read_bytes()
    (tmp_path / "out" / ".grid.png.part").write_bytes(b"half")
    sample_pretrained(*arguments)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"grid.png", "samples.npz", "sampling.json", "state"}
    assert (tmp_path / "out" / "samples.npz").read_bytes() == before


def test_names_of_classes_without_a_recipe(models, tmp_path, monkeypatch):
    """Those that a run's generator brings, else ImageNet's of a thousand."""
    tokenizer, generator = models
    tokenizer.save_pretrained(tmp_path / "t")
    generator.save_pretrained(tmp_path / "g")
    paths = str(tmp_path / "g"), str(tmp_path / "t")
    with pytest.raises(UserError, match=r"^sample.classes: 'Sneaker' is a name, and the names of the 3 classes are "):
        sample_pretrained(*paths, section("Sneaker", []), tmp_path / "out", "cpu")
    write_json(tmp_path / "g" / "trained_on.json", {"tokenizer": "", "classes": NAMES})
    sample_pretrained(*paths, section("Sneaker", ["sample.files=png"]), tmp_path / "out", "cpu")
    with np.load(tmp_path / "out" / "samples.npz") as archive:
        assert set(archive["arr_1"].tolist()) == {NAMES.index("Sneaker")}
    assert [path.name for path in (tmp_path / "out" / "images").iterdir()] == ["1-Sneaker"]
    write_json(tmp_path / "g" / "trained_on.json", {"tokenizer": ""})
    with pytest.raises(UserError, match=r"trained_on.json cannot be used: classes: Field required"):
        class_names(tmp_path / "g", 3)
    names = class_names("llamagen-b-256", 1000)
    assert len(set(names)) == 1000
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert class_names("llamagen-b-256", 1000) == ()


def test_a_folder_in_which_another_process_draws(models, tmp_path):
    tokenizer, generator = models
    tokenizer.save_pretrained(tmp_path / "t")
    generator.save_pretrained(tmp_path / "g")
    paths = str(tmp_path / "g"), str(tmp_path / "t")
    with (
        RunFolder(tmp_path / "out").locked(),
        pytest.raises(UserError, match=r"^another process is working in .*out$"),
    ):
        sample_pretrained(*paths, section("", []), tmp_path / "out", "cpu")


@pytest.mark.parametrize(
    ("content", "prompts"), [("a cat\n\n  a red dog \n", ("a cat", "a red dog")), (None, ("no file",))]
)
def test_prompts_are_lines_of_a_file_or_a_text(tmp_path, content, prompts):
    if content is not None:
        (tmp_path / "prompts.txt").write_text(content)
    assert read_prompts("no file" if content is None else str(tmp_path / "prompts.txt")) == prompts


@pytest.mark.parametrize("length", [100, 255, 5000])
def test_a_prompt_longer_than_names_of_files_are(length):
    assert read_prompts("ö" * length) == ("ö" * length,)


def test_no_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n")
    for given in ("", str(tmp_path / "prompts.txt")):
        with pytest.raises(
            UserError, match=r"^--prompts: there is no text; give one, or a file with one on each line$"
        ):
            read_prompts(given)
    (tmp_path / "prompts.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"^--prompts: .*prompts.txt cannot be read as text: "):
        read_prompts(str(tmp_path / "prompts.txt"))


def replace_dim(options):
    return options.model_copy(update={"quantizer": options.quantizer.model_copy(update={"dim": 3})}).build()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["seed=1"], "'seed=1' is not of the section sample, the only one without a recipe"),
        (["sample.topk=1"], "sample.topk: no such option"),
        (["sample.count=0"], "sample.count: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_wrong_options_without_a_recipe(changes, sentence):
    with pytest.raises(UserError) as error:
        section("", changes)
    assert str(error.value) == sentence


def test_the_command(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def smalti(*arguments):
        return CliRunner().invoke(app, arguments)

    for stage in (("train", "tokenizer"), ("tokenize",), ("train", "generator")):
        assert smalti(*stage, "toy.yaml", "--out", "run").exit_code == 0
    assert smalti("sample", "run", "--trace").exit_code == 0
    (tmp_path / "run" / "samples" / "trace.gif").unlink()
    assert smalti("sample", "run", "--trace").exit_code == 0  # of samples that are there
    assert (tmp_path / "run" / "samples" / "trace.gif").exists()
    models = ("--generator", "run/generator", "--tokenizer", "run/tokenizer")
    assert smalti("sample", *models, "--classes", "1", "sample.top_k=2", "--out", "out").exit_code == 0
    assert (tmp_path / "out" / "grid.png").exists()
    told = smalti("sample", "run", "--classes", "no", "--force").exception
    assert str(told) == "sample.classes: no class is called 'no'; there are 0, 1, 2"
    for arguments, sentence in (
        (models[:2], "--generator and --tokenizer belong together: give both, or a recipe"),
        (models, "without a recipe --out is needed, the folder for the samples"),
        (
            (*models, "--out", "new", "--shrink"),
            "--force and --shrink go with a recipe, not with --generator and --tokenizer",
        ),
        ((), "give a recipe or a run folder, or --generator and --tokenizer"),
    ):
        assert str(smalti("sample", *arguments).exception) == f"sample: {sentence}"
