"""Tokens of other projects become the samples of a token set."""

import io
import json
import pickle
import re
import warnings

import numpy as np
import pytest

from smalti.core.data.array_file import parse_array
from smalti.core.data.stored_tokens import ArrayTokens, LineTokens
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout


def refused(sentence):
    return pytest.raises(UserError, match=f"^{re.escape(sentence)}")


@pytest.fixture
def codes(tmp_path):
    """Write `images` images as FQGAN does, with streams of these suffixes; gives the tokens `(N, V, L, S)`."""

    def codes(*suffixes, folder="codes", views=2, images=5):
        tokens = np.random.default_rng(len(folder)).integers(0, 9, (images, views, 6, len(suffixes)))
        for name in (folder, "labels"):
            (tmp_path / name).mkdir(exist_ok=True)
        for number, image in enumerate(tokens):
            for stream, suffix in enumerate(suffixes):
                np.save(tmp_path / folder / f"{number}{suffix}.npy", image[None, :, :, stream])
            np.save(tmp_path / "labels" / f"{number}.npy", np.array([number % 3]))
        return tokens

    return codes


def options(tmp_path, *folders, **changes):
    content = {
        "codes": [str(tmp_path / folder) for folder in folders or ("codes",)],
        "labels": str(tmp_path / "labels"),
    }
    return ArrayTokens.model_validate({**content, "classes": 3, **changes})


@pytest.mark.parametrize("suffixes", [("",), ("_vis", "_sem"), ("_vis", "_sem_mid", "_sem_high")])
def test_codes_of_llamagen_and_fqgan(tmp_path, codes, suffixes):
    tokens = codes(*suffixes)
    source = options(tmp_path).source()
    assert source == (str(tmp_path / "codes"), ("0", "1", "2"), ("codes 0", "codes 1"), 5)
    layout = TokenLayout.grid(2, 3, (9,) * len(suffixes))
    keys, found, labels = options(tmp_path).read(layout, 1, 4)
    assert np.array_equal(found, tokens[1:4])
    assert labels == [1, 2, 0]
    assert keys == ["00000001", "00000002", "00000003"]


def test_two_ranges_of_crops_and_padding(tmp_path, codes):
    near, far = codes("", folder="ten_crop", views=10), codes("", folder="ten_crop_105", views=10)
    stored = options(tmp_path, "ten_crop", "ten_crop_105", count=4)
    assert len(stored.source().views) == 20
    assert stored.source().samples == 4
    layout = TokenLayout.sequence(6, (9,))
    assert np.array_equal(stored.read(layout, 0, 4).tokens, np.concatenate([near, far], 1)[:4])


def test_what_is_wrong_with_codes_is_told(tmp_path, codes):
    layout = TokenLayout.sequence(6, (9,))
    with refused(f"{tmp_path / 'labels'} does not exist; expected a folder of 0.npy, 1.npy, ..."):
        options(tmp_path).source()
    codes("")
    with refused(f"{tmp_path / 'labels'} holds labels of 5 images, expected 6"):
        options(tmp_path, count=6).source()
    with refused(f"the codes of images 0 to 4 in {tmp_path / 'codes'}: expected tokens of shape (views, positions, "
                 "streams) (2, 6, 2), as the recipe's tokenizer makes them, got (2, 6, 1)"):  # fmt: skip
        options(tmp_path).read(TokenLayout.sequence(6, (9, 9)), 0, 5)
    path = tmp_path / "codes" / "2.npy"
    np.save(path, np.zeros((2, 6), np.int64))
    with refused(f"{path}: expected shape (1, views, positions), got (2, 6)"):
        options(tmp_path).read(layout, 2, 3)
    path.write_bytes(path.read_bytes()[:90])
    with refused(f"{path} is damaged: "):
        options(tmp_path).read(layout, 2, 3)
    path.unlink()
    with refused(f"{path} does not exist, though others of its kind do"):
        options(tmp_path).read(layout, 2, 3)
    (tmp_path / "codes" / "0.npy").unlink()
    with refused(f"{tmp_path / 'codes'} holds no codes of image 0: expected 0.npy, or 0_vis.npy and 0_sem.npy"):
        options(tmp_path).source()


def test_lines_of_rar(tmp_path):
    path = tmp_path / "tokens.jsonl"
    tokens = np.random.default_rng(0).integers(0, 9, (7, 6))
    path.write_text(
        "".join(json.dumps({"class_id": n % 3, "tokens": row.tolist()}) + "\n" for n, row in enumerate(tokens))
    )
    stored = LineTokens(path=str(path), classes=3)
    assert stored.source() == (str(path), ("0", "1", "2"), ("line",), 7)
    found = stored.read(TokenLayout.sequence(6, (9,)), 2, 6)
    assert np.array_equal(found.tokens, tokens[2:6, None, :, None])
    assert found.labels == [2, 0, 1, 2]
    with refused(f"lines 3 to 6 of {path}: expected tokens of shape (views, positions, streams) (1, 5, 1), as the "):
        stored.read(TokenLayout.sequence(5, (9,)), 2, 6)


def test_a_damaged_line_is_told(tmp_path):
    path = tmp_path / "damaged.jsonl"
    with refused(f"{path} does not exist; expected lines with class_id and tokens there"):
        LineTokens(path=str(path)).source()
    path.write_text('{"class_id": 1, "tokens": [1]}\n{"tokens": [1]}\n')
    with refused(f"line 2 of {path} is damaged: expected class_id and tokens (KeyError: 'class_id')"):
        LineTokens(path=str(path)).read(TokenLayout.sequence(1, (9,)), 0, 2)


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1, 6), }\n("),
        header("(" * 500 + ")" * 500 + "\n"),
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 1000000000), }\n"),
        header("{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000, 1000000000), }\n"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n") + pickle.dumps([1]),
        header("__import__('os').system('touch executed')\n"),
    ],
)
def test_arrays_that_are_none(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    for name in ("codes", "labels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.npy").write_bytes(content)
    with pytest.raises(UserError) as caught:
        ArrayTokens(codes=("codes",), labels="labels").source()
    assert str(caught.value).startswith("codes/0.npy is damaged: ")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"class_id": 1, "tokens": [1.5, 2]}', "line 1 of {} is damaged: expected class_id and tokens (ValueError"),
        (
            '{"class_id": 1, "tokens": [1000000000000000000000]}',
            "line 1 of {} is damaged: expected class_id and tokens",
        ),
        ("[" * 100_000, "line 1 of {} is damaged: expected class_id and tokens"),
        ('{"class_id": 7, "tokens": [1, 2]}', "line 1 of {} has the label 7: with 3 classes, labels are 0 to 2"),
        ('{"class_id": 1, "tokens": [1, 16]}', "lines 1 to 1 of {} hold the token 16 in stream 0: its codebook has"),
        ('{"class_id": 1, "tokens": [1, -1]}', "lines 1 to 1 of {} hold the token -1 in stream 0: its codebook has"),
    ],
)
def test_lines_that_no_shard_can_hold(tmp_path, line, sentence):
    path = tmp_path / "tokens.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        LineTokens(path=str(path), classes=3).read(TokenLayout.sequence(2, (16,)), 0, 1)
    assert str(caught.value).startswith(sentence.format(path))


def test_nobody_is_warned_of_a_header_that_is_broken_source():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="does not contain the correct keys"):
            parse_array(buffer.getvalue().replace(b"'shape'", b"'\\Eape'"))
    assert not told
