"""Inception against torch-fidelity's own network, with seeded weights in the layout of its file."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from smalti.core.errors import UserError
from smalti.eval.inception import InceptionOptions
from smalti.eval.inception_weights import NAMES, URL, inception_weights, published_network
from smalti.eval.resize_for_inception import resized_for_inception


def random_images(count, height, width):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def test_features_are_those_of_torch_fidelity(inception_file):
    images = random_images(2, 40, 56)
    published = published_network(inception_file)
    blocks = {}
    published.Mixed_6d.register_forward_hook(lambda _, __, output: blocks.update(spatial=output))
    with torch.inference_mode():
        pool, logits = published(images.movedim(-1, 1))
    expected = {
        "pool": pool,
        "spatial": blocks["spatial"][:, :7].permute(0, 2, 3, 1).flatten(1),
        "logits": logits,
    }
    found = InceptionOptions(weights=inception_file).build()(images)
    assert [found[name].shape[1] for name in expected] == [2048, 2023, 1008]
    for name, values in expected.items():
        difference = found[name] - values
        assert float(difference.norm() / values.norm()) < (3e-6 if name == "spatial" else 1e-6), name
        # What is not averaged over positions keeps the rounding of single ones, of both networks.
        assert float(difference.abs().max() / values.abs().max()) < (2e-5 if name == "spatial" else 1e-6), name


def test_resize_is_what_changes_the_features(inception_file):
    images = random_images(1, 40, 56)
    pools, names = [], []
    for resize in ("tensorflow", "pytorch", "clean"):
        extractor = InceptionOptions(weights=inception_file, resize=resize).build()
        pools.append(extractor(images)["pool"])
        names.append(extractor.fingerprint)
    assert len(set(names)) == 3
    assert not torch.allclose(pools[0], pools[1], rtol=1e-3)
    assert not torch.allclose(pools[0], pools[2], rtol=1e-3)


@pytest.mark.parametrize("size", [(299, 299), (17, 400), (300, 1)])
def test_the_resize_of_tensorflow(size):
    images = random_images(2, *size)
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        images.movedim(-1, 1).float(), size=(299, 299), align_corners=False
    )
    torch.testing.assert_close(resized_for_inception(images, "tensorflow"), (expected - 128) / 128, rtol=0, atol=1e-6)


def test_the_clean_resize_is_pillows_of_each_channel_as_float():
    images = random_images(1, 20, 500)
    plane = Image.fromarray(images[0, :, :, 1].numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    expected = (np.asarray(plane).clip(0, 255) - 128) / 128
    np.testing.assert_array_equal(resized_for_inception(images, "clean")[0, 1].numpy(), expected)
    same = random_images(1, 299, 299)
    torch.testing.assert_close(resized_for_inception(same, "clean"), (same.movedim(-1, 1).float() - 128) / 128)


@pytest.mark.parametrize("images", [torch.zeros(1, 4, 4, 3), torch.zeros(1, 4, 4, 1, dtype=torch.uint8)])
def test_other_images_are_refused(inception_file, images):
    with pytest.raises(UserError, match=r"^images must be uint8 \(B, H, W, 3\), got "):
        InceptionOptions(weights=inception_file).build()(images)


def test_missing_weights_say_where_to_get_them_and_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError) as error:
        inception_weights()
    assert str(error.value) == (
        f"the Inception weights are missing and could not be fetched (no network): download {URL} and put it at "
        f"{tmp_path / 'hub' / 'checkpoints' / NAMES[0]}, or give its path as extractor.weights=FILE"
    )
    with pytest.raises(UserError) as error:
        inception_weights(tmp_path / "other.pth")
    assert str(error.value).startswith(f"the Inception weights {tmp_path / 'other.pth'} do not exist: download {URL}")


def unreachable(*_, **__):
    raise OSError("no network")


def test_the_cache_is_looked_at_under_both_published_names(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in reversed(NAMES):
        (folder / name).write_bytes(b"")
        assert inception_weights() == folder / name


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.pth does not hold torch-fidelity's Inception weights: "):
        InceptionOptions(weights=tmp_path / "w.pth").build()
