"""DINOv2 and CLIP with tiny seeded networks in the layout of their repositories."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from smalti.core.errors import UserError
from smalti.core.plugins import registry

IMAGES = torch.randint(0, 256, (2, 20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folders(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    dinov2 = transformers.Dinov2Config(**sizes, patch_size=56, image_size=224)
    transformers.Dinov2Model(dinov2).save_pretrained(tmp_path / "dinov2")
    clip = transformers.CLIPVisionConfig(**sizes, patch_size=8, image_size=16, projection_dim=5, intermediate_size=8)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(tmp_path / "clip")
    return tmp_path


@pytest.mark.parametrize(("name", "side", "width"), [("dinov2", 224, 8), ("clip", 16, 5)])
def test_features_are_those_of_the_network_on_pillows_pixels(folders, name, side, width):
    extractor = registry().options("features", name)(model=str(folders / name)).build()
    found = extractor(IMAGES)["pool"]
    assert found.shape == (2, width)
    pixels = np.stack([Image.fromarray(image.numpy()).resize((side, side), Image.BICUBIC) for image in IMAGES])
    values = torch.from_numpy(pixels).movedim(-1, 1) / 255
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (extractor.family.mean, extractor.family.std))
    with torch.inference_mode():
        outputs = extractor.network(pixel_values=(values - mean) / std)
    expected = outputs.last_hidden_state[:, 0] if name == "dinov2" else outputs.image_embeds
    torch.testing.assert_close(found, expected)
    assert len(extractor.fingerprint) == 16
    with pytest.raises(UserError, match=r"^images must be uint8 \(B, H, W, 3\), got torch.float32"):
        extractor(IMAGES.float())


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_missing_weights_say_where_to_get_them(tmp_path, name):
    with pytest.raises(
        UserError, match=r"download https://huggingface.co/\S+ and give its folder as extractor.model=F"
    ):
        registry().options("features", name)(model=str(tmp_path / "nothing")).build()


def test_weights_of_another_network_are_refused(folders):
    """Those that are missing would be drawn by chance."""
    with pytest.raises(UserError) as error:
        registry().options("features", "clip")(model=str(folders / "dinov2")).build()
    assert str(error.value).startswith(
        f"{folders / 'dinov2'} is damaged or holds no CLIPVisionModelWithProjection: it lacks vision_model."
    )
    weights = folders / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"clip is damaged or holds no CLIPVisionModelWithProjection: "):
        registry().options("features", "clip")(model=str(folders / "clip")).build()
