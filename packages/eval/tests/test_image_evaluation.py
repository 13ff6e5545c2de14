"""Two sets of images to figures, in the features of a small seeded network."""

import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core.contracts import Tokenizer
from smalti.core.data.images import to_uint8
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.core.plugins import registry
from smalti.core.progress import Reporter
from smalti.core.testing.processes import run_in_processes
from smalti.eval.comparison import compared
from smalti.eval.evaluation_sides import Asked
from smalti.eval.extraction import Wanted, extract
from smalti.eval.frechet import frechet_distance_of_rows
from smalti.eval.image_evaluation import evaluate_images
from smalti.eval.image_report import write_evaluation
from smalti.eval.made_images import GeneratorImages
from smalti.eval.pairwise import psnr
from smalti.eval.protocols import PROTOCOLS, Protocol, protocol
from smalti.eval.statistics_of_images import statistics_of_images

ALL = ("fid", "sfid", "is", "kid", "precision-recall", "density-coverage", "cmmd")
TOY = {
    "name": "toy",
    "summary": "for tests",
    "extractor": {"name": "small-network"},
    "metrics": ("fid", "is"),
    "images": 40,
}
TOGETHER = (*ALL, "psnr", "ssim", "psnr-pooled")
QUIET = Reporter(quiet=True)


def pictures(seed, count=40, side=16):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, side, side, 3)).astype(np.uint8)
    images[: count // 2] //= 2
    return images


@pytest.fixture
def folders(tmp_path):
    """Images, and beside them the same with noise under the same names."""
    images = pictures(0)
    noisy = (images.astype(int) + np.random.default_rng(1).integers(-20, 20, images.shape)).clip(0, 255)
    for name, content in (("originals", images), ("copies", noisy.astype(np.uint8))):
        (tmp_path / name).mkdir()
        for index, image in enumerate(content):
            Image.fromarray(image).save(tmp_path / name / f"{index:02d}.png")
    return str(tmp_path / "copies"), str(tmp_path / "originals")


def toy(**changes):
    return Protocol.model_validate({**TOY, **changes})


def evaluated(images, reference, metrics=(), settings=None, **more):
    return evaluate_images(Asked(images, reference, settings or toy(), metrics, **more), QUIET)


def values(evaluation):
    return {figure.name: figure.value for figure in evaluation.figures}


def features(folder):
    extractor = registry().options("features", "small-network")().build()
    images = [np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return extractor(torch.from_numpy(np.stack(images)))


def measured(rank, images, reference, metrics, batch_size):
    return values(evaluated(images, reference, metrics, batch_size=batch_size))


def test_figures_are_those_of_the_features(folders, tmp_path):
    found = evaluated(*folders, TOGETHER)
    assert list(values(found)) == [
        *("fid", "sfid", "is", "kid", "precision", "recall", "density", "coverage", "cmmd"),
        *("psnr", "ssim", "psnr-pooled"),
    ]
    own, others = (features(tmp_path / name)["pool"] for name in ("copies", "originals"))
    assert values(found)["fid"] == pytest.approx(frechet_distance_of_rows(own, others), rel=1e-6)
    originals = torch.from_numpy(pictures(0)).movedim(-1, 1)
    images = torch.stack(
        [torch.from_numpy(np.array(Image.open(path))) for path in sorted((tmp_path / "copies").iterdir())]
    )
    noise = psnr(images.movedim(-1, 1), originals)
    assert values(found)["psnr"] == pytest.approx(float(noise.mean()))
    assert [pair.psnr for pair in found.pairs.worst] == noise.sort().values[:8].tolist()
    assert [pair.psnr for pair in found.pairs.best] == noise.sort(descending=True).values[:8].tolist()


def test_identical_sets_are_at_distance_zero(folders):
    found = values(evaluated(folders[1], folders[1], ("fid", "cmmd", "precision-recall")))
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["cmmd"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1, 1)


def test_batches_do_not_change_the_figures(folders):
    expected = values(evaluated(*folders, TOGETHER, batch_size=7))
    for batch_size in (1, 64):
        assert values(evaluated(*folders, TOGETHER, batch_size=batch_size)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_processes_do_not_change_the_figures(folders):
    expected = values(evaluated(*folders, TOGETHER, batch_size=7))
    for batch_size in (7, 64):  # of the larger batches the second process gets none
        first, second = run_in_processes(measured, *folders, TOGETHER, batch_size)
        assert first == pytest.approx(expected, rel=1e-9)
        assert second == {}


def test_results_carry_all_that_they_depend_on(folders, tmp_path):
    write_evaluation(tmp_path / "out", evaluated(*folders))
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["protocol"]["name"] == "toy"
    assert content["protocol"]["seed"] == 2020
    assert content["extractor"] == {"name": "small-network", "fingerprint": "small-0"}
    assert content["images"]["count"] == content["reference"]["count"] == 40
    assert len(content["images"]["sha256"]) == 64
    assert content["images"]["sha256"] != content["reference"]["sha256"]
    assert set(content["libraries"]) > {"smalti-eval", "torch"}
    assert content["warnings"][0].startswith("40 images are fewer than 10000: distances are biased upwards")
    assert content["figures"]["fid"]["extractor"] == "small-network small-0"
    assert "reference" in content["figures"]["fid"]


def test_the_report_shows_figures_pairs_and_a_table(folders, tmp_path):
    found = evaluated(*folders, ("fid", "precision-recall", "psnr", "ssim"), repeats=5)
    write_evaluation(tmp_path / "out", found)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 2 * 2 * 8
    assert page.count("<svg") == 3  # the brand, precision and recall, the histogram
    assert re.search(r"95 %: [\d.]+ to [\d.]+<", page)
    assert "$" not in re.sub(r"\$\\\w+\$", "", page)  # nothing was left to fill in
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| FID ↓ | " in text
    assert "![pairs](pairs.png)" in text
    table = (tmp_path / "out" / "table.tex").read_text()
    assert table.startswith("% 40 images, protocol toy, images ")
    assert r"Method & FID $\downarrow$ & Precision $\uparrow$ & Recall $\uparrow$ & PSNR $\uparrow$" in table
    before = page
    write_evaluation(tmp_path / "out", evaluated(*folders, ("fid", "precision-recall", "psnr", "ssim"), repeats=5))
    assert (tmp_path / "out" / "report.html").read_text() == before


def test_an_interval_surrounds_the_figure(folders):
    found = evaluated(*folders, TOGETHER, repeats=20)
    for figure in found.figures:
        low, high = figure.interval
        certain = figure.unit == "share" and figure.value in (0, 1)
        assert low == high if certain else low < figure.value < high, figure.name
    noise = found.pairs.psnr
    reach = 1.96 * float(noise.std()) / len(noise) ** 0.5  # of a mean, in closed form
    low, high = next(figure.interval for figure in found.figures if figure.name == "psnr")
    assert (high - low) / 2 == pytest.approx(reach, rel=0.5)


def test_statistics_take_the_place_of_the_images(folders, tmp_path):
    path = statistics_of_images(folders[1], toy(), tmp_path, None, 8, "cpu", QUIET)
    assert re.fullmatch(r"originals-toy-40-[0-9a-f]{8}\.npz", path.name)
    expected = values(evaluated(*folders, ("fid",)))
    assert values(evaluated(folders[0], str(path), ("fid",))) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UserError) as error:
        evaluated(folders[0], str(path), ("fid", "kid"))
    assert str(error.value) == f"kid needs the images of the reference, but {path} holds statistics only"
    with pytest.raises(UserError) as error:
        evaluated(folders[0], str(path), ("psnr",))
    assert str(error.value).startswith("a reconstruction needs the images of the reference, but ")
    with pytest.raises(
        UserError, match=r"was made with the extractor small-0, protocol toy has small-1: make others with"
    ):
        evaluated(folders[0], str(path), settings=toy(extractor={"name": "small-network", "seed": 1}))
    with pytest.raises(UserError, match=r"was made with the preprocessing None, protocol toy has .'image_size': 16, "):
        evaluated(folders[0], str(path), settings=toy(preprocessing=Preprocessing(image_size=16)))
    with pytest.raises(UserError, match=r"holds statistics: give images first, the reference second$"):
        evaluated(str(path), folders[1])


def test_a_tokenizer_is_measured_in_process(folders, tmp_path):
    options = registry().options("tokenizer", "tiles")
    tokenizer = options(preprocessing=Preprocessing(image_size=16, channels=3, fit="pad")).build()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = evaluated(f"tokenizer:{tmp_path / 'tokenizer'}", folders[1], ("fid", "psnr"))
    assert found.record["images"]["made_by"] == "tokenizer"
    (tmp_path / "decoded").mkdir()
    loaded = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    for index, image in enumerate(pictures(0)):
        pixels = torch.from_numpy(image).movedim(-1, 0)[None].float() / 127.5 - 1
        decoded = to_uint8(loaded.decode(loaded.encode(pixels)))[0]
        Image.fromarray(decoded.numpy()).save(tmp_path / "decoded" / f"{index:02d}.png")
    stored = evaluated(str(tmp_path / "decoded"), folders[1], ("fid", "psnr"))
    assert values(found) == pytest.approx(values(stored), rel=1e-9)


def test_a_generator_is_measured_while_it_samples(prepared, folders, tmp_path, monkeypatch):
    from smalti.core.files import write_json
    from smalti.core.stages.sample import Sample
    from smalti.core.weights import fingerprint

    context = prepared("run")
    tokenizer = Tokenizer.from_pretrained(context.run / "tokenizer")
    generator = context.recipe.generator.build(tokenizer.layout(), 3)
    generator.save_pretrained(context.run / "generator")
    trained_on = {"tokenizer": fingerprint(tokenizer, tokenizer.config()), "classes": ["a", "b", "c"]}
    write_json(context.run / "generator" / "trained_on.json", trained_on)
    found = evaluated(f"generator:{context.run.path}", folders[1], ("fid",))
    assert found.record["images"] | {"source": "", "sha256": ""} == {
        "source": "",
        "made_by": "generator",
        "count": 30,
        "sha256": "",
        "jpegs": 0,
    }
    shutil.rmtree(context.run / "samples")
    Sample(context).run()
    stored = evaluated(str(context.run / "samples" / "samples.npz"), folders[1], ("fid",))
    assert stored.record["images"]["sha256"] == found.record["images"]["sha256"]
    assert values(stored) == pytest.approx(values(found), rel=1e-9)
    with pytest.raises(UserError) as error:
        evaluated(f"generator:{context.run.path}", folders[1], ("psnr",))
    assert str(error.value) == "psnr compares pairs, but samples of a generator have no counterparts"

    source = GeneratorImages(context.run.path, None, "cpu")
    source.together = 20  # in blocks of its own, which may be larger than an even share
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            taken = sum(len(batch.images) for batch in source.batches(1, rank, world_size))
            assert source.share(1, rank, world_size) == taken
    monkeypatch.setattr("smalti.eval.extraction.distributed.world_size", lambda: 2)
    extractor = registry().options("features", "small-network")().build()
    own = extract(source, extractor, Wanted(rows=frozenset({"pool"})), 1, "cpu", QUIET)
    assert own.rows["pool"].shape == (20, 6)


def test_pairs_alone_need_no_features_and_tell_their_reference(folders, tmp_path, monkeypatch):
    network = type(registry().options("features", "small-network")().build())
    monkeypatch.setattr(network, "forward", pytest.fail)
    (tmp_path / "others").mkdir()
    for index, image in enumerate(pictures(2)):
        Image.fromarray(image).save(tmp_path / "others" / f"{index:02d}.png")
    for name, reference in (("one", folders[1]), ("two", str(tmp_path / "others"))):
        found = evaluated(folders[0], reference, ("psnr",))
        assert found.record["reference"]["count"] == 40
        assert found.summary == f"{folders[0]} against {reference} (40 images)."
        write_evaluation(tmp_path / name, found)
    with pytest.raises(UserError, match=r"are not comparable: reference.sha256 is '[0-9a-f]{64}' and '[0-9a-f]{64}'$"):
        compared(*(tmp_path / name / "results.json" for name in ("one", "two")))


def test_colours_are_not_cut_for_a_grey_tokenizer(folders, tmp_path):
    registry().options("tokenizer", "tiles")().build().save_pretrained(tmp_path / "tokenizer")
    np.savez(tmp_path / "colours.npz", pictures(0))
    with pytest.raises(UserError) as error:
        evaluated(f"tokenizer:{tmp_path / 'tokenizer'}", str(tmp_path / "colours.npz"), ("fid",))
    assert str(error.value) == (
        f"{tmp_path / 'colours.npz'} holds images in colour, but the tokenizer takes grey ones: bring them to grey "
        "first"
    )
    assert evaluated(f"tokenizer:{tmp_path / 'tokenizer'}", folders[1], ("fid",)).figures


def test_pairs_must_be_pairs(folders, tmp_path):
    copies = tmp_path / "copies"
    (copies / "39.png").rename(copies / "zebra.png")
    with pytest.raises(UserError) as error:
        evaluated(*folders, ("psnr",))
    assert str(error.value) == (
        "metrics of pairs need the images in the same order, but zebra.png would be compared with 39.png: give the "
        "reconstructions the names of their originals"
    )
    (copies / "zebra.png").rename(copies / "39.png")
    Image.new("RGB", (9, 16)).save(copies / "05.png")
    with pytest.raises(UserError, match=r"^image 5 and its counterpart in .*originals are of different sizes: "):
        evaluated(*folders, ("psnr",))
    Image.new("RGB", (9, 16)).save(copies / "00.png")
    with pytest.raises(
        UserError, match=r"^image 0 and its counterpart in .*originals are of different sizes: metrics of pairs need"
    ):
        evaluated(*folders, ("psnr",))
    (copies / "00.png").unlink()
    with pytest.raises(UserError, match=r"^psnr compares pairs, but there are 39 images and 40 references$"):
        evaluated(*folders, ("psnr",))


def test_a_crop_brings_both_sides_to_one_size(folders, tmp_path):
    Image.new("RGB", (9, 16)).save(tmp_path / "copies" / "00.png")
    found = evaluated(*folders, ("psnr", "fid"), settings=toy(preprocessing=Preprocessing(image_size=8)))
    assert found.record["protocol"]["preprocessing"]["image_size"] == 8
    assert found.pairs.worst[0].image.shape == (8, 8, 3)


def test_the_reference_batch_of_samples_is_no_reference_of_reconstructions(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("smalti.eval.evaluation_record.VIRTUAL_IMAGES", 5)
    path = tmp_path / "VIRTUAL.npz"
    pool = features(tmp_path / "originals")["pool"].double()
    np.savez(path, pictures(0)[:5], mu=pool.mean(0).numpy(), sigma=torch.cov(pool.T).numpy())
    assert not any("virtual batch" in text for text in evaluated(folders[0], str(path), ("fid",)).warnings)
    told = evaluated(folders[0], str(path), ("fid",), settings=toy(name="rfid-toy")).warnings
    assert any("looks like ADM's virtual batch, a reference for samples (gFID)" in text for text in told)
    assert "precision" in values(evaluated(folders[0], str(path), ("fid", "precision-recall")))


def test_jpeg_is_a_warning(folders, tmp_path):
    Image.fromarray(pictures(0)[0]).save(tmp_path / "copies" / "00.jpg")
    assert any(text.startswith("1 of 41 images are stored as JPEG") for text in evaluated(*folders, ("fid",)).warnings)


def test_what_is_wrong_is_told_before_an_image_is_read(folders, tmp_path):
    for path in (tmp_path / "copies").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"^unknown metric 'fit'; there are fid, sfid, fd, "):
        evaluated(*folders, ("fit",))
    with pytest.raises(UserError, match=r"does not exist, expected a folder of images"):
        evaluated(folders[0], str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"^unknown protocol 'fid'; there are adm, torch-fidelity, clean"):
        protocol("fid")
    with pytest.raises(UserError, match=r"^protocol adm: extractor.precision: Input should be 'float32', 'float64' or"):
        protocol("adm", ["extractor.precision=half"])
    with pytest.raises(UserError, match=r"image 00.png of .*copies cannot be read"):
        evaluated(*folders)


def test_every_protocol_is_complete():
    for name in PROTOCOLS:
        needed = ["extractor.folder=f"] if name == "classifier" else []
        assert protocol(name, needed).name.startswith(name)
    changed = protocol("adm", ["extractor.precision=bfloat16", "extractor.weights=/w.pth"])
    assert changed.name == "adm with extractor.precision=bfloat16"
    assert protocol("adm").extractor.precision == "float32"


@pytest.fixture
def classes(tmp_path):
    """The same images in folders of two classes, in tar shards, and in an archive, and a reference in folders."""
    labels = np.arange(40) % 2
    for name, seed in (("drawn", 0), ("real", 1)):
        for index, (image, label) in enumerate(zip(pictures(seed), labels, strict=True)):
            folder = tmp_path / name / "ab"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:02d}.png")
    order = np.argsort(labels, kind="stable")
    np.savez(tmp_path / "drawn.npz", pictures(0)[order], labels[order])
    with tarfile.open(tmp_path / "drawn.tar", "w") as tar:
        for index in order:
            png = (tmp_path / "drawn" / "ab"[labels[index]] / f"{index:02d}.png").read_bytes()
            for ending, content in (("png", png), ("cls", b"%d\n" % labels[index])):
                info = tarfile.TarInfo(f"{index:02d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return tmp_path


def test_classes_are_compared_one_by_one(classes):
    asked = ("class-fid", "accuracy")
    found = evaluated(str(classes / "drawn"), str(classes / "real"), asked)
    fid, accuracy = found.figures
    by_class = [
        frechet_distance_of_rows(*(features(classes / side / label)["pool"] for side in ("drawn", "real")))
        for label in "ab"
    ]
    assert list(fid.parts.values()) == pytest.approx(by_class)
    assert fid.value == pytest.approx(np.mean(by_class))
    assert list(fid.parts) == ["class 0", "class 1"]
    logits = [features(classes / "drawn" / label)["logits"].argmax(1) for label in "ab"]
    right = [float((decisions == label).double().mean()) for label, decisions in enumerate(logits)]
    assert list(accuracy.parts.values()) == pytest.approx(right)
    assert accuracy.value == pytest.approx(np.mean(right))
    assert "FID by class: a Frechet distance of 20 vectors of 6 values is biased upwards" in found.warnings[-1]
    for name in ("drawn.npz", "drawn.tar"):
        stored = evaluated(str(classes / name), str(classes / "real"), asked)
        assert values(stored) == pytest.approx(values(found), rel=1e-9)
        assert evaluated(str(classes / name), str(classes / "real"), asked, count=9).figures[1].parts.keys() == {
            "class 0"
        }


def test_figures_of_classes_need_classes(classes, folders):
    with pytest.raises(UserError, match=r"copies does not tell the classes of its images: a folder has a folder for "):
        evaluated(folders[0], str(classes / "real"), ("class-fd",))
    (classes / "real" / "b").rename(classes / "real" / "c")
    with pytest.raises(
        UserError, match=r"^class-fd compares class by class, but .*drawn has the classes a, b and .*c$"
    ):
        evaluated(str(classes / "drawn"), str(classes / "real"), ("class-fd",))


def test_only_what_is_comparable_is_compared(folders, tmp_path):
    asked = {"one": {}, "same": {}, "fewer": {"count": 20}, "other": {"settings": toy(neighbours=5)}}
    paths = {}
    for name, changes in asked.items():
        write_evaluation(tmp_path / name, evaluated(*folders, ("fid", "is"), **changes))
        paths[name] = tmp_path / name / "results.json"
    rows = compared(paths["one"], paths["same"])
    assert [(row.name, row.first == row.second) for row in rows] == [("fid", True), ("is", True)]
    with pytest.raises(UserError) as error:
        compared(paths["one"], paths["fewer"])
    assert str(error.value) == f"{paths['one']} and {paths['fewer']} are not comparable: images.count is 40 and 20"
    with pytest.raises(UserError, match=r"are not comparable: protocol.neighbours is 3 and 5$"):
        compared(paths["one"], paths["other"])
