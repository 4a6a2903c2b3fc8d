"""The token cache: an exact order on any number of ranks, what damage is found, what an interrupted writer leaves."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import token_caches as caches
import torch
import zarr

from vqscale import config as configuration
from vqscale.data.config_tokens import TokensConfig
from vqscale.data.tokens import format as form
from vqscale.data.tokens import write as writing
from vqscale.data.tokens.stream import Cache, TokenBatch, TokenStream

NUM, BROKEN = 31, (0, 5, 6, 30)  # a prime number of images; one storage shard begins, one ends with a broken one
GOOD = [number for number in range(NUM) if number not in BROKEN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished cache with broken images. Not to be changed."""
    place = tmp_path_factory.mktemp("cache")
    caches.write(place, NUM, BROKEN)
    return place


def config(folder, **others) -> TokensConfig:
    return TokensConfig(**{"path": str(folder), "window_shards": 3, **others})


def take(settings: TokensConfig, count: int, consumed: int = 0, world: int = 1, batch: int = 8) -> list[TokenBatch]:
    """The next `count` global batches of training: those of all ranks, joined."""
    streams = [TokenStream(settings, batch, rank, world, seed=3) for rank in range(world)]
    steps = zip(*(islice(stream.batches(consumed), count) for stream in streams), strict=True)
    return [join(parts) for parts in steps]


IN_TENSORS = ("ids", "labels", "valid", "numbers", "views")


def join(batches) -> TokenBatch:
    parts = list(batches)
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in IN_TENSORS}
    return TokenBatch(keys=[key for part in parts for key in part.keys], **joined)


def same(one: list[TokenBatch], other: list[TokenBatch]) -> bool:
    return len(one) == len(other) and all(
        (a.keys, a.context, a.broken) == (b.keys, None, [])
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in IN_TENSORS)
        for a, b in zip(one, other, strict=True)
    )


def right(batch: TokenBatch, card) -> bool:
    """Every row has the ids, the label and the key of the image and the view that it says it has."""
    rows = zip(batch.ids, batch.labels, batch.keys, batch.numbers.tolist(), batch.views.tolist(), strict=True)
    return all(
        np.array_equal(ids.numpy(), caches.known_ids(card, number)[view])
        and label == number * 3 % caches.LABELS
        and key == f"n{number}"
        for ids, label, key, number, view in rows
    )


def test_every_image_once_an_epoch_with_its_ids_and_labels(folder):
    stream = TokenStream(config(folder), 9, seed=3)
    assert (stream.num_samples, stream.num_codes, stream.grid) == (27, 1 << 18, caches.GRID)
    orders = []
    for _ in range(2):
        epochs = [join(islice(stream.batches(27 * epoch), 3)) for epoch in range(5)]
        for epoch in epochs:
            assert sorted(epoch.numbers.tolist()) == GOOD
            assert epoch.valid.all()
            assert right(epoch, stream.card)
        orders.append([epoch.numbers.tolist() for epoch in epochs])
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders[0]}) == 5
    other = TokenStream(config(folder), 9, seed=4)
    assert next(iter(other.batches())).numbers.tolist() != orders[0][0][:9]


def test_the_global_batch_is_the_same_on_any_number_of_ranks(folder):
    alone = take(config(folder), 9)
    for world in (2, 4, 8):
        assert same(alone, take(config(folder), 9, world=world))


@pytest.mark.parametrize("window", [0, 1, 3])
def test_resuming_anywhere_is_as_if_never_stopped(folder, window):
    settings = config(folder, window_shards=window)
    whole = take(settings, 9)
    for step, world in ((1, 1), (2, 2), (3, 4), (4, 2), (7, 1)):  # over two ends of epochs
        assert same(whole[step : step + 4], take(settings, min(4, 9 - step), consumed=8 * step, world=world))


def test_a_batch_larger_than_an_epoch(folder):
    batch = take(config(folder), 1, batch=64, world=2)[0]
    assert Counter(batch.numbers[:54].tolist()) == dict.fromkeys(GOOD, 2)
    assert right(batch, caches.card(NUM))


def test_consumed_may_be_any_number(folder):
    """Another batch size after a resume leaves a remainder; the samples still come one after the other."""
    whole = join(take(config(folder), 8)).numbers.tolist()
    for world in (1, 2):
        later = join(take(config(folder), 3, consumed=5, world=world, batch=10)).numbers.tolist()
        assert later == whole[5:35]


def test_views_are_drawn_evenly_and_first_is_the_centre(folder):
    epochs = join(islice(TokenStream(config(folder), 27, seed=1).batches(), 30))
    counts = Counter(epochs.views.tolist())
    assert set(counts) == {0, 1, 2}
    expected = 27 * 30 / 3
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 13.8  # one in a thousand exceeds it
    for number in GOOD:  # each image by itself, and not all at once
        assert set(epochs.views[epochs.numbers == number].tolist()) == {0, 1, 2}
    assert all(len(set(epochs.views[start : start + 27].tolist())) == 3 for start in range(0, 270, 27))
    assert take(config(folder, views="first"), 3)[0].views.sum() == 0
    kinds = [join(take(config(folder, views=views), 4)).numbers.tolist() for views in ("all", "first")]
    assert kinds[0] == kinds[1]


def test_views_follow_from_the_seed(folder):
    drawn = []
    for seed in (1, 2, 1):
        epoch = next(iter(TokenStream(config(folder), 27, seed=seed).batches()))
        drawn.append(dict(zip(epoch.numbers.tolist(), epoch.views.tolist(), strict=True)))
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize(("world", "batch"), [(1, 5), (1, 27), (2, 8), (4, 32), (4, 4)])
def test_evaluation_takes_each_image_once_in_order(folder, world, batch):
    streams = [TokenStream(config(folder), batch, rank, world, train=False) for rank in range(world)]
    for consumed in (0, batch, 27):
        steps = list(zip(*(stream.batches(consumed) for stream in streams), strict=True))  # as many on every rank
        assert len(steps) == -(-(27 - min(consumed, 27)) // batch)
        if not steps:
            continue
        found = join(join(parts) for parts in steps)
        assert found.numbers[found.valid].tolist() == GOOD[consumed:]
        assert all(len(part.ids) == batch // world for parts in steps for part in parts)
        assert found.views.sum() == 0
        assert (found.numbers[~found.valid] == -1).all()
        assert (found.labels[~found.valid] == -1).all()
        valid = {name: getattr(found, name)[found.valid] for name in IN_TENSORS}
        keys = [key for key, is_valid in zip(found.keys, found.valid.tolist(), strict=True) if is_valid]
        assert right(TokenBatch(keys=keys, **valid), caches.card(NUM))


def test_several_ids_at_a_position_and_very_many_codes(tmp_path):
    card = caches.write(tmp_path, 9, num_ids=2, num_codes=1 << 40)
    batch = next(iter(TokenStream(config(tmp_path), 4).batches()))
    assert batch.ids.shape == (4, *caches.GRID, 2)
    assert batch.ids.dtype == torch.int64
    assert int(batch.ids.min()) > 1 << 39
    assert right(batch, card)


def test_the_arrays_on_the_disk(folder):
    ids = zarr.open_array(str(folder / "ids"), mode="r")
    assert (ids.shape, ids.dtype, ids.fill_value) == ((NUM, 3, *caches.GRID), np.int32, -1)
    assert (ids.shards, ids.chunks) == ((4, 3, *caches.GRID), (4, 1, *caches.GRID))
    text = (folder / "ids" / "zarr.json").read_text()
    for word in ("blosc", "zstd", "bitshuffle", "crc32c"):
        assert f'"{word}"' in text
    assert np.all(ids[list(BROKEN)] == -1)
    assert sorted(path.name for path in (folder / "ids").iterdir()) == sorted(
        ["zarr.json", *(f"c.{shard}.0.0.0" for shard in range(8))]
    )
    assert Cache(folder).card.broken == tuple((number, f"n{number}", "torn") for number in BROKEN)


def test_bitshuffle_makes_int32_as_small_as_packed_bits(tmp_path):
    made, _ = writing.begin(
        tmp_path, caches.card(512, views=("center",), grid=(16, 16), storage=512), caches.index(512).samples
    )
    writer = writing.Writer(tmp_path, made)
    ids = np.random.default_rng(0).integers(0, 1 << 14, (512, 1, 16, 16))
    writer.write(0, ids)
    assert writer.entries[0]["bytes"] / ids.size < 14 / 8 * 1.02
    assert np.array_equal(form.open_ids(tmp_path)[:], ids)


def test_a_batch_must_divide_by_the_ranks(folder):
    with pytest.raises(ValueError, match=r"batch of 9 images does not divide by 2 processes: .* 8 or 10"):
        TokenStream(config(folder), 9, 0, 2)


def test_bad_configs_are_refused():
    with pytest.raises(configuration.ConfigError, match="window_shards") as refusal:
        configuration.parse(TokensConfig, {"path": "", "window_shards": -1})
    assert "path is empty" in str(refusal.value)


def test_a_flipped_bit_is_an_error_and_never_a_wrong_id(tmp_path):
    caches.write(tmp_path)
    path = tmp_path / "ids" / "c.2.0.0.0"
    content = bytearray(path.read_bytes())
    content[20] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(RuntimeError, match=r"ids/c\.2\.0\.0\.0 was damaged after the cache was sealed"):
        list(TokenStream(config(tmp_path), 8, train=False).batches())


def test_ids_that_are_no_codes_are_found_when_written_sealed_and_read(tmp_path):
    card, _ = writing.begin(tmp_path, caches.card(NUM), caches.index(NUM).samples)
    writer = writing.Writer(tmp_path, card)
    for wrong in (card.num_codes, -1, -2, (1 << 32) + 1):
        ids = writer.empty()
        ids[:] = 7
        ids[2, 1, 1, 1] = wrong
        with pytest.raises(writing.CacheError, match=r"images 4 to 7 have ids from .* where 0 to 262143 are codes"):
            writer.write(1, ids)
    assert not form.finished(tmp_path, card)
    wide = writing.Writer(tmp_path, dataclasses.replace(card, num_codes=card.num_codes + 1))
    for shard in range(card.num_shards):
        ids = wide.empty()
        ids[:] = card.num_codes if shard == 3 else 7
        wide.write(shard, ids)
    assert writing.verify(tmp_path, card, wide.entries, [2, 4]) == []
    writing.seal(tmp_path, wide.card, wide.entries, [])
    changed = TokenStream(config(tmp_path), 8, train=False)
    changed.cache.card = card
    with pytest.raises(RuntimeError, match=r"c\.3\.0\.0\.0 was damaged .*262144, where 0 to 262143 are codes"):
        list(changed.batches())
    faults = writing.verify(tmp_path, card, wide.entries, range(card.num_shards))
    assert len(faults) == 1
    with pytest.raises(writing.CacheError, match=r"1 of the 8 storage shards .*c\.3\.0\.0\.0 has ids from 262144"):
        writing.seal(tmp_path, card, wide.entries, faults)
    assert 3 not in form.finished(tmp_path, card)


def test_a_storage_shard_in_the_place_of_another_is_found_and_removed(tmp_path):
    card, _ = writing.begin(tmp_path, caches.card(8), caches.index(8).samples)
    writer = writing.Writer(tmp_path, card)
    caches.fill(writer, 0)
    caches.fill(writer, 1)
    one, other = (form.shard_file(tmp_path, card, shard) for shard in (0, 1))
    other.write_bytes(one.read_bytes())  # ids of this tokenizer, with checksums that fit
    faults = writing.verify(tmp_path, card, writer.entries, [0, 1])
    assert faults == ["c.1.0.0.0 has other bytes than were written"]
    assert one.exists()
    assert not other.exists()


def test_a_writer_goes_on_after_any_interruption(tmp_path):
    whole = tmp_path / "whole"
    caches.write(whole, NUM, BROKEN)
    torn = tmp_path / "torn"
    card, entries = writing.begin(torn, caches.card(NUM), caches.index(NUM).samples)
    assert entries == {}
    (torn / "labels" / "zarr.json").unlink()  # killed before all arrays were there
    card, entries = writing.begin(torn, caches.card(NUM), caches.index(NUM).samples)
    one, other = writing.Writer(torn, card, 0), writing.Writer(torn, card, 1)
    for writer, shard in ((one, 0), (other, 1), (one, 2), (other, 7)):
        caches.fill(writer, shard, BROKEN)
    ledgers = sorted((torn / "ledger").iterdir())
    assert len(ledgers) == 2
    ledgers[0].write_text(ledgers[0].read_text() + '{"shard": 3, "by')  # the disk was full
    (torn / "ids" / "c.4.0.0.abc.partial").write_text("left by a killed writer")
    (torn / "ids" / "c.7.0.0.0").write_text("half")
    card, entries = writing.begin(torn, caches.card(NUM), caches.index(NUM).samples)
    assert sorted(entries) == [0, 1, 2]
    writer = writing.Writer(torn, card)
    for shard in (3, 4, 5, 6, 7):
        caches.fill(writer, shard, BROKEN)
    entries |= writer.entries
    assert writing.verify(torn, card, entries, range(8)) == []
    assert writing.seal(torn, card, entries, []).broken == Cache(whole).card.broken
    files = [json.loads((place / "manifest.json").read_text())["files"] for place in (whole, torn)]
    assert files[0] == files[1]
    assert all((whole / name).read_bytes() == (torn / name).read_bytes() for name in files[0])
    assert Cache(torn).fingerprint() == Cache(whole).fingerprint()


def test_a_damaged_cache_is_repaired_like_an_unfinished_one(tmp_path):
    before = caches.write(tmp_path)
    assert writing.check(tmp_path, caches.card(NUM)) == before
    (tmp_path / "ids" / "c.5.0.0.0").unlink()
    assert writing.check(tmp_path, caches.card(NUM)) is None
    card, entries = writing.begin(tmp_path, caches.card(NUM), caches.index(NUM).samples)
    assert sorted(entries) == [0, 1, 2, 3, 4, 6, 7]
    writer = writing.Writer(tmp_path, card)
    caches.fill(writer, 5)
    writing.seal(tmp_path, card, entries | writer.entries, [])
    assert writing.check(tmp_path, caches.card(NUM)) == before
