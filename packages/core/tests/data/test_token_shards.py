import gzip
import json
import os
import re
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.data.tar_shards import index_shard, read_shard
from smalti.core.data.token_batches import TokenBatches
from smalti.core.data.token_shards import (
    TokenManifest,
    TokenSet,
    read_token_shards,
    shard_name,
    write_manifest,
    write_token_shard,
)
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout

LAYOUT = TokenLayout.grid(2, 3, (300, 7))
VIEWS = ("original", "flip")


def random_tokens(count, layout=LAYOUT, views=2, seed=0):
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.integers(0, layout.vocab, (count, views, layout.positions, layout.streams))


def write(folder, *sizes, made_with=LAYOUT, **changes):
    tokens = random_tokens(sum(sizes), made_with)
    labels = np.arange(sum(sizes)) % 3
    entries, start = [], 0
    for number, size in enumerate(sizes):
        part = slice(start, start + size)
        keys = [f"s{index}" for index in range(start, start + size)]
        entries.append(write_token_shard(folder / shard_name(number), keys, tokens[part], labels[part], made_with))
        start += size
    content = {
        "layout": made_with,
        "classes": ("a", "b", "c"),
        "tokenizer": "0123",
        "dataset": "threes",
        "samples": sum(sizes),
        "views": VIEWS,
        "shards": tuple(entries),
    }
    write_manifest(folder, TokenManifest(**{**content, **changes}))
    return tokens, labels


def refused(sentence):
    return pytest.raises(UserError, match=re.escape(sentence))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (TokenLayout.sequence(4, (256,)), np.uint8),
        (TokenLayout.sequence(4, (257,)), np.uint16),
        (TokenLayout.scales(((1, 1), (2, 2)), (65536, 3)), np.uint16),
        (TokenLayout.grid(2, 2, (2**18,)), np.uint32),
    ],
)
def test_what_is_written_is_read_in_the_smallest_type(tmp_path, layout, dtype):
    tokens, labels = write(tmp_path, 3, 2, made_with=layout)
    found = read_token_shards(tmp_path)
    assert found.tokens.dtype == dtype
    assert np.array_equal(found.tokens, tokens)
    assert np.array_equal(found.labels, labels)
    assert found.labels.dtype == np.int64
    assert (found.layout, found.classes, found.tokenizer, found.views) == (layout, ("a", "b", "c"), "0123", VIEWS)
    assert len(found) == 5


def test_shards_are_webdataset_tars_with_the_same_bytes_each_time(tmp_path):
    tokens, _ = write(tmp_path / "one", 2, 2)
    write(tmp_path / "two", 2, 2)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "layout.json",
        "tokens-000000.tar",
        "tokens-000001.tar",
    ]
    samples = list(read_shard(str(tmp_path / "one" / "tokens-000001.tar")))
    assert [(sample["__key__"], sample["cls"]) for sample in samples] == [("s2", b"2"), ("s3", b"0")]
    (tmp_path / "array.npy").write_bytes(samples[0]["npy"])
    assert np.array_equal(np.load(tmp_path / "array.npy"), tokens[2])


def test_keys_with_dots_and_folders_stay_one_sample(tmp_path):
    entry = write_token_shard(tmp_path / "a.tar", ["a/b.c/x.1", "a/b.c/x.2"], random_tokens(2), [0, 1], LAYOUT)
    assert entry.samples == 2
    assert [sample["__key__"] for sample in read_shard(str(tmp_path / "a.tar"))] == ["a/b_c/x_1", "a/b_c/x_2"]
    with refused("two samples in a row have the key 'x_1'"):
        write_token_shard(tmp_path / "b.tar", ["x.1", "x_1"], random_tokens(2), [0, 1], LAYOUT)


def test_writing_refuses_tokens_that_do_not_fit(tmp_path):
    path = tmp_path / "a.tar"
    tokens = random_tokens(2)
    tokens[1, 0, 2, 1] = 7
    with refused(f"the tokens for {path} hold the token 7 in stream 1: its codebook has the codes 0 to 6"):
        write_token_shard(path, ["a", "b"], tokens, [0, 1], LAYOUT)
    with refused(f"the tokens for {path} hold the token -1 in stream 0"):
        write_token_shard(path, ["a", "b"], -np.ones_like(tokens), [0, 1], LAYOUT)
    with refused("have (5, 2) positions and streams, the layout has (6, 2)"):
        write_token_shard(path, ["a", "b"], random_tokens(2)[:, :, :5], [0, 1], LAYOUT)
    with refused("are float64 (2, 2, 6, 2), expected integers"):
        write_token_shard(path, ["a", "b"], random_tokens(2).astype(float), [0, 1], LAYOUT)
    assert not list(tmp_path.iterdir())


def test_missing_folder_and_layout(tmp_path):
    with refused(f"{tmp_path}/tokens does not exist; expected a folder of token shards"):
        read_token_shards(tmp_path / "tokens")
    with refused(f"{tmp_path}/layout.json does not exist; expected the layout of token shards there"):
        read_token_shards(tmp_path)


def test_missing_and_damaged_shards(tmp_path):
    write(tmp_path, 3, 3)
    shard = tmp_path / shard_name(1)
    content = shard.read_bytes()
    for end in (0, 100, 512, 2000, 3 * 1536):
        os.truncate(shard, end)
        with refused(f"shard {shard} is damaged or incomplete after"):
            read_token_shards(tmp_path)
        shard.write_bytes(content)
    shard.unlink()
    with refused(f"shard {shard} does not exist"):
        read_token_shards(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"samples": 4}, "layout.json is damaged: it tells of 4 samples, its shards of 3"),
        (
            {"shards": ({"name": "tokens-000000.tar", "samples": 4},), "samples": 4},
            "tokens-000000.tar holds 3 samples, layout.json says 4",
        ),
        (
            {"shards": ({"name": "tokens-000000.tar", "samples": 2},), "samples": 2},
            "tokens-000000.tar holds more samples than the 2 that layout.json says",
        ),
        (
            {"shards": ({"name": "tokens-000000.tar", "samples": 2**60},), "samples": 2**60},
            f"layout.json tells of tokens ({2**60}, 2, 6, 2), more than fit into memory",
        ),
        ({"views": ("original",)}, "holds tokens uint16 (2, 6, 2), layout.json asks for uint16 (1, 6, 2)"),
        (
            {"layout": TokenLayout.grid(2, 3, (3, 7))},
            "sample 's0' of shard {folder}/tokens-000000.tar holds tokens uint16 (2, 6, 2), layout.json asks for uint8",
        ),
        (
            {"layout": TokenLayout.grid(2, 3, (300, 2))},
            "the tokens of sample 's0' of shard {folder}/tokens-000000.tar hold the token",
        ),
        (
            {"classes": ("a", "b")},
            "sample 's2' of shard {folder}/tokens-000000.tar has the label '2': with 2 classes, labels are 0 to 1",
        ),
    ],
)
def test_shards_that_contradict_the_layout(tmp_path, changes, sentence):
    write(tmp_path, 3, **changes)
    with refused(sentence.format(folder=tmp_path)):
        read_token_shards(tmp_path)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"s0.cls": b"0"}, "sample 's0' of shard {shard} has no tokens: expected .npy"),
        ({"s0.cls": b"0", "s0.npy": b"\x93NUMPY"}, "sample 's0' of shard {shard} is damaged: "),
        ({"s0.npy": None}, "sample 's0' of shard {shard} has the label ''"),
        ({"s0.cls": b"x", "s0.npy": None}, "sample 's0' of shard {shard} has the label 'x'"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path, make_tar, files, sentence):
    write(tmp_path, 1)
    shard = tmp_path / shard_name(0)
    (sample,) = read_shard(str(shard))
    shard.write_bytes(
        make_tar({name: sample["npy"] if content is None else content for name, content in files.items()})
    )
    with refused(sentence.format(shard=shard)):
        read_token_shards(tmp_path)


def test_a_layout_file_that_cannot_be_used(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / "layout.json"
    content = json.loads(path.read_text())
    del content["tokenizer"]
    path.write_text(json.dumps(content))
    with refused(f"{path} cannot be used: tokenizer: Field required"):
        read_token_shards(tmp_path)


@pytest.fixture(scope="module")
def one_sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write(folder, 1)
    (sample,) = read_shard(str(folder / shard_name(0)))
    return folder, sample["npy"]


@settings(deadline=None, max_examples=100)
@given(place=st.integers(0, 127), value=st.integers(0, 255))
def test_a_damaged_array_header_is_a_sentence(one_sample, make_tar, place, value):
    folder, content = one_sample
    damaged = bytearray(content)
    damaged[place] = value
    (folder / shard_name(0)).write_bytes(make_tar({"s0.cls": b"0", "s0.npy": bytes(damaged)}))
    try:
        assert read_token_shards(folder).tokens.shape == (1, 2, 6, 2)
    except UserError as error:
        assert "'s0'" in str(error)  # noqa: PT017


def test_tokens_of_another_tokenizer(tmp_path):
    write(tmp_path, 1)
    tokens = read_token_shards(tmp_path)
    tokens.check_tokenizer("0123")
    with refused(
        f"the token shards in {tmp_path} were made by another tokenizer (0123, this one is 4567): "
        "run `smalti tokenize` again"
    ):
        tokens.check_tokenizer("4567")


def token_set(count, views=2):
    """Every token tells the sample and the view it belongs to."""
    layout = TokenLayout.sequence(3, (1000, 2))
    sample, view = np.meshgrid(np.arange(count), np.arange(views), indexing="ij")
    tokens = np.stack([sample, view], -1)[:, :, None].repeat(3, 2).astype(np.uint16)
    names = tuple(f"view {number}" for number in range(views))
    return TokenSet(Path("tokens"), tokens, np.arange(count) % 5, layout, tuple("abcde"), "0123", names)


def test_batches_of_tokens():
    batch = next(TokenBatches(token_set(64), 64, 0, 0, 1))
    tokens, labels = batch
    assert (tokens.shape, tokens.dtype, labels.dtype) == ((64, 3, 2), torch.int64, torch.int64)
    assert sorted(tokens[:, 0, 0].tolist()) == list(range(64))
    assert torch.equal(tokens[:, 0, 0] % 5, labels)
    assert torch.equal(tokens, tokens[:, :1].expand(-1, 3, -1))


def test_views_are_drawn_anew_in_each_epoch():
    first, second = islice(TokenBatches(token_set(64), 64, 0, 0, 1), 2)
    views = [
        dict(zip(batch.tokens[:, 0, 0].tolist(), batch.tokens[:, 0, 1].tolist(), strict=True))
        for batch in (first, second)
    ]
    assert 10 < sum(views[0].values()) < 54
    assert views[0] != views[1]
    assert first.tokens[:, 0, 0].tolist() != second.tokens[:, 0, 0].tolist()
    only = next(TokenBatches(token_set(64, views=1), 64, 0, 0, 1))
    assert not only.tokens[:, 0, 1].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 30), st.integers(1, 4), st.integers(0, 5))
def test_strides_cover_every_sample_once(more, world_size, seed):
    count = world_size + more
    tokens = token_set(count)
    shares = []
    for rank in range(world_size):
        size = len(range(rank, count, world_size))
        shares.append(next(TokenBatches(tokens, size, seed, rank, world_size)).tokens[:, 0])
    assert sorted(torch.cat(shares)[:, 0].tolist()) == list(range(count))
    alone = next(TokenBatches(tokens, count, seed, 0, 1)).tokens[:, 0]
    assert all(torch.equal(share, alone[rank::world_size]) for rank, share in enumerate(shares))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_state_from_anywhere_goes_on_exactly(data):
    world_size = data.draw(st.integers(1, 3), "world size")
    count = world_size + data.draw(st.integers(0, 20), "more samples")
    arguments = (
        token_set(count),
        data.draw(st.integers(1, 9), "batch size"),
        data.draw(st.integers(0, 5), "seed"),
        data.draw(st.integers(0, world_size - 1), "rank"),
        world_size,
    )
    first, second = TokenBatches(*arguments), TokenBatches(*arguments)
    for _ in islice(first, data.draw(st.integers(0, 15), "batches before")):
        continue
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for expected, found in islice(zip(first, second, strict=False), 10):
        assert torch.equal(expected.tokens, found.tokens)
        assert torch.equal(expected.labels, found.labels)
        assert first.state_dict() == second.state_dict()


def test_fewer_samples_than_processes():
    with refused("tokens holds 2 samples, too few for 3 processes"):
        TokenBatches(token_set(2), 1, 0, 0, 3)


@pytest.mark.parametrize("name", ["pipe:touch executed", "../tokens-000000.tar", "/etc/passwd", "a b.tar", ""])
def test_shards_have_plain_names(tmp_path, monkeypatch, name):
    """In the folder itself, given as `.`, a name would be what webdataset takes: a path, an address or a command."""
    write(tmp_path, 2)
    path = tmp_path / "layout.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    with refused("layout.json cannot be used: shards.0.name: String should match pattern"):
        read_token_shards(".")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("label", [b"1" * 5000, b"99999999999", b"\xc2\xb2"])
def test_labels_that_are_no_class(tmp_path, make_tar, label):
    write(tmp_path, 2)
    path = tmp_path / shard_name(0)
    members = tar_members(path)
    members["s1.cls"] = label
    path.write_bytes(make_tar(members))
    with refused(f"sample 's1' of shard {path} has the label '"):
        read_token_shards(tmp_path)


def tar_members(path):
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def sparse(path, packed):
    """A file of a tebibyte, nearly all of it a hole, in a header of GNU's tar."""
    header = tarfile.TarInfo("s.npy").tobuf(tarfile.GNU_FORMAT)
    header = bytearray(header)
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"\x80\0\0\0\0\0\1\0\0\0\0\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(packed(bytes(header) + bytes(1024)))


@pytest.mark.parametrize("read", [read_shard, index_shard])
def test_files_that_unfold_beyond_memory(tmp_path, read):
    path = tmp_path / "bomb.tar"
    sparse(path, bytes)
    with refused(f"shard {path} is damaged or incomplete after 0 samples: 's.npy' is sparse or larger than 1024 MiB"):
        list(read(str(path)))


def test_a_shard_that_is_called_like_a_command(tmp_path, monkeypatch):
    write(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch executed").write_bytes(gzip.compress((tmp_path / shard_name(0)).read_bytes()))
    assert len(list(read_shard("pipe:touch executed"))) == 2
    assert not (tmp_path / "executed").exists()
