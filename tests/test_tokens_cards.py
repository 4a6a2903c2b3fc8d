"""The card of a token cache: whose ids it holds, what names it, and which caches are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import token_caches as caches

from vqscale.data.config_tokens import TokensConfig
from vqscale.data.tokens import format as form
from vqscale.data.tokens import write as writing
from vqscale.data.tokens.stream import Cache, TokenStream

NUM = 8
# Other values: of what a writer that continues a cache must agree in, and of what may differ.
IDENTITY = {
    "tokenizer": "def456",
    "num_codes": 5,
    "num_ids": 2,
    "grid": (16, 16),
    "views": ("center",),
    "num_images": 9,
    "source": "others",
    "image_size": 16,
    "short_side": 9,
    "interpolation": "bilinear",
    "reading": (("length", 9),),
}
FREE = {
    "digits": (2, 3),
    "prior": "f00d",
    "storage": 64,
    "shards": ("elsewhere/0000.tar",),
    "tokenizer_path": "elsewhere",
    "command": "python tools/encode.py T OUT --batch 9",
    "commit": "0123abc",
    "damage": ("0000.tar is torn",),
    "broken": ((1, "n1", "torn"),),
}


def config(folder, **others) -> TokensConfig:
    return TokensConfig(path=str(folder), **others)


def test_a_cache_of_other_ids_is_not_continued(tmp_path):
    assert {*IDENTITY, *FREE} == {field.name for field in dataclasses.fields(form.Card)}
    card = caches.write(tmp_path, NUM, seal=False)
    for name, value in IDENTITY.items():
        with pytest.raises(ValueError, match=r"is another one:\n") as refusal:
            writing.check(tmp_path, dataclasses.replace(card, **{name: value}))
        assert str(refusal.value).splitlines()[1:-1] == [f"  {name}: {getattr(card, name)} there, {value} now"]
    for name, value in FREE.items():  # that of the cache stays
        assert writing.check(tmp_path, dataclasses.replace(card, **{name: value})) is None


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex and no card\.json"):
        writing.check(tmp_path, caches.card(NUM))
    with pytest.raises(ValueError, match="is a file"):
        writing.check(tmp_path / "thesis.tex", caches.card(NUM))


def test_the_fingerprint_names_what_order_and_ids_follow_from(tmp_path):
    def name(**others) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        caches.write(folder, NUM, **{"broken": (2,)} | others)
        return Cache(folder).fingerprint()

    first = name()
    assert name(command="python tools/encode.py T ELSEWHERE", commit="0123abc") == first
    for change in (
        {"tokenizer": "def456"},
        {"source": "others"},
        {"views": ("center", "center mirrored", "right")},
        {"grid": (3, 2)},
        {"image_size": 16},
        {"short_side": 9},
        {"interpolation": "bilinear"},
        {"reading": (("length", 9),)},
        {"storage": 8},
        {"broken": ()},
        {"broken": (5,)},
    ):
        assert name(**change) != first, change


def test_an_unfinished_cache_is_refused_with_the_command_that_finishes_it(tmp_path):
    caches.write(tmp_path / "cache", seal=False)
    with pytest.raises(ValueError, match=r"not finished: 7 of 8 storage shards.*: python tools/encode.py T OUT"):
        TokenStream(config(tmp_path / "cache"), 8)
    with pytest.raises(ValueError, match=r"no token cache in .*: change the path, or make one with vqscale encode"):
        TokenStream(config(tmp_path / "other"), 8)


def test_a_cache_of_something_else_is_refused(tmp_path):
    caches.write(tmp_path, NUM)
    with pytest.raises(ValueError) as refusal:
        Cache(tmp_path).expect(tokenizer="def456", num_codes=4096, grid=(16, 16), num_ids=2)
    for words in (
        "fingerprint abc123",
        "has def456",
        "262144 codes, but expected are 4096",
        "[2, 3] positions",
        "[16, 16]",
    ):
        assert words in str(refusal.value)
    with pytest.raises(ValueError, match="fingerprint abc123"):
        TokenStream(config(tmp_path, tokenizer="ab0"), 8)
    TokenStream(config(tmp_path, tokenizer="abc"), 8).cache.expect("abc123", 1 << 18, caches.GRID, 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ids/c.2.0.0.0", lambda data: None, "ids/c.2.0.0.0 is not there"),
        ("ids/c.2.0.0.0", lambda data: data[:-1], "ids/c.2.0.0.0 has .* bytes and not"),
        ("labels/c.0", lambda data: data + b"x", "labels/c.0 has .* bytes and not"),
        ("card.json", lambda data: data.replace(b"abc123", b"abc124"), "card.json was changed"),
        ("card.json", lambda data: b"{}", "does not describe a token cache"),
        ("manifest.json", lambda data: data[:-9], "not finished: 8 of 8"),
    ],
)
def test_files_that_were_changed_are_found_at_opening(tmp_path, name, change, message):
    caches.write(tmp_path)
    new = change((tmp_path / name).read_bytes())
    (tmp_path / name).unlink()
    if new is not None:
        (tmp_path / name).write_bytes(new)
    with pytest.raises(ValueError, match=message):
        Cache(tmp_path)


@pytest.mark.parametrize("train", [True, False])
def test_a_cache_without_one_image_with_ids_is_refused(tmp_path, train):
    caches.write(tmp_path, NUM, broken=range(NUM))
    with pytest.raises(ValueError, match=r"has no image with ids: encode other images"):
        TokenStream(config(tmp_path), 8, train=train)


@pytest.mark.parametrize(("num_codes", "dtype"), [(1 << 31, np.int32), ((1 << 31) + 1, np.int64)])
def test_ids_take_four_bytes_while_the_largest_fits(tmp_path, num_codes, dtype):
    card = caches.write(tmp_path, NUM, num_codes=num_codes)
    ids = form.open_ids(tmp_path)
    assert ids.dtype == dtype
    assert ids[:].max() == num_codes - 1
    assert np.array_equal(ids[:], [caches.known_ids(card, number) for number in range(NUM)])


def test_the_size_of_storage_shards_follows_from_the_images_alone():
    assert [form.storage_for(count) for count in (1, 4096, 4097, 10_000, 50_000, 1_281_167)] == [
        64, 64, 128, 256, 1024, 1024
    ]  # fmt: skip


def test_a_folder_in_the_place_of_a_card_is_named(tmp_path):
    (tmp_path / "card.json").mkdir()
    with pytest.raises(ValueError, match=r"card\.json does not describe a token cache \(IsADirectoryError"):
        Cache(tmp_path)
