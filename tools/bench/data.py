"""`bench data`: the stream of images beside a plain pipeline of the webdataset library on the same shards.

Both decode, crop and batch with the same functions; what differs is who decides the order and finds the bytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from vqscale.programs.commands import words

from . import command

if TYPE_CHECKING:
    from vqscale.data.config import ImagesConfig

ABOUT = """\
Images per second of two readers that take turns on the same shards:

  ours         vqscale.data.samples: an index of the shards, reads at an offset, an order that resumes at any sample
  webdataset   WebDataset(...).shuffle(1000), decoding by the same function, WebLoader with as many processes

Without --shards, JPEG files of 400 x 300 are drawn into a temporary folder. The shards are read once before
anything is timed, so they come from the page cache: what is compared is the work, not the disk. Rates are medians over
the rounds; start is the time to the first batch of a new reader, index the time to read the headers of all shards."""

SHARDS = 4  # that are drawn


def main(argv: Sequence[str]) -> int:
    """Print a table, or with --json one object."""
    args = arguments(argv)
    import torch

    from vqscale.data.config import ImagesConfig

    with tempfile.TemporaryDirectory(prefix="vqscale-bench-") as scratch:
        shards = args.shards or _draw(Path(scratch), args.num)
        config = ImagesConfig(
            shards, args.image_size, resize=args.resize, num_workers=args.workers, index_dir=f"{scratch}/index"
        )
        found = measure(config, args.batch, args.images, args.rounds)
    found |= command.origin("data", argv, "cpu", torch.get_num_threads())
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"{found['samples']} samples in {found['shards']} shards, {args.workers} processes, batch {args.batch}")
    print(f"index {found['index_s']:.3f} s")
    print(f"{'':12}{'images/s':>10}{'start s':>10}")
    for name in ("ours", "webdataset"):
        print(f"{name:12}{found[name]['images_per_s']:>10.0f}{found[name]['start_s']:>10.2f}")
    print(f"ours / webdataset = {found['ratio']:.3f}")
    print(command.place(found))
    return 0


def measure(config: ImagesConfig, batch: int, images: int, rounds: int) -> dict[str, Any]:
    """Both readers in turns, `images` each a round after their first batch."""
    from vqscale.data.samples import SampleStream
    from vqscale.data.shards.index import build

    begin = time.perf_counter()
    index = build(config)
    index_s = time.perf_counter() - begin
    for shard in index.shards:  # into the page cache
        if Path(shard).exists():
            Path(shard).read_bytes()
    readers: dict[str, Callable[[], Iterable[Any]]] = {
        "ours": lambda: SampleStream(config, batch=batch).batches(0),
        "webdataset": lambda: _plain(config, index.shards, batch),
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    starts: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, reader in readers.items():
            rate, start = _time(reader, images, batch)
            rates[name].append(rate)
            starts[name].append(start)
    found: dict[str, Any] = {
        name: {"images_per_s": median(rates[name]), "start_s": median(starts[name]), "rounds": rates[name]}
        for name in readers
    }
    ratio = found["ours"]["images_per_s"] / found["webdataset"]["images_per_s"]
    facts = {"samples": len(index), "shards": len(index.shards), "index_s": index_s, "ratio": ratio}
    return {**facts, "batch": batch, "workers": config.num_workers, "image_size": config.image_size, **found}


def _time(reader: Callable[[], Iterable[Any]], images: int, batch: int) -> tuple[float, float]:
    """(images per second after the first batch, seconds to the first batch)."""
    begin = time.perf_counter()
    batches = iter(reader())
    next(batches)
    first = time.perf_counter()
    steps = max(1, images // batch)
    for _ in range(steps):
        next(batches)
    end = time.perf_counter()
    del batches
    return steps * batch / (end - first), first - begin


def _plain(config: ImagesConfig, shards: list[str], batch: int) -> Iterator[Any]:
    """What a user of the webdataset library writes: shuffled shards and a shuffle buffer, endless."""
    import numpy as np
    import torch
    from webdataset import WebDataset, WebLoader

    from vqscale.data import pixels

    def decode(sample: dict[str, Any]) -> tuple[Any, int]:
        data = next(sample[key] for key in config.suffixes if key in sample)
        seed = int.from_bytes(sample["__key__"].encode()[-6:], "big")
        return pixels.augment(pixels.decode(data), config, seed), int(sample.get("cls", b"-1"))

    def stack(samples: list[tuple[Any, int]]) -> tuple[Any, Any]:
        raw = torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2)
        images = raw.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
        return images, torch.tensor([label for _, label in samples])

    data = WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(1000).map(decode)
    data = data.batched(batch, collation_fn=stack, partial=False).repeat()
    return iter(WebLoader(data, batch_size=None, num_workers=config.num_workers))


def _draw(place: Path, count: int) -> str:
    """`count` JPEG files of 400 x 300 in SHARDS shards; their pattern."""
    import io

    from PIL import Image
    from webdataset import TarWriter

    from vqscale.data.made.shapes import draw

    for shard in range(SHARDS):
        with TarWriter(str(place / f"{shard}.tar")) as tar:
            for number in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                picture, label = draw(number, 400, 0)
                file = io.BytesIO()
                Image.fromarray(picture[:300]).save(file, "JPEG", quality=90)
                tar.write({"__key__": f"{number:08d}", "jpg": file.getvalue(), "cls": str(label)})
    return f"{place}/{{0..{SHARDS - 1}}}.tar"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    out = command.parser("data", ABOUT)
    out.add_argument("--shards", help="pattern of the shards to read (drawn ones)")
    out.add_argument("--num", type=words.count, default=512, help="images to draw (512)")
    out.add_argument("--images", type=words.count, default=1024, help="images that a reader gives in a round (1024)")
    out.add_argument("--rounds", type=words.count, default=3, help="turns of each reader (3)")
    out.add_argument("--batch", type=words.count, default=64, help="images of a batch (64)")
    out.add_argument("--workers", type=words.number, default=2, help="processes that read and decode (2)")
    out.add_argument("--image-size", type=words.count, default=256, help="pixels of a side that come out (256)")
    out.add_argument("--resize", type=words.count, default=None, help="short side before the crop (image size)")
    out.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = out.parse_args(argv)
    fewest = args.num // SHARDS * (SHARDS // max(1, args.workers))
    if args.shards is None and fewest < args.batch:
        out.error(
            f"a process of the webdataset library reads whole shards and gives whole batches: {args.num} images in "
            f"{SHARDS} shards for {args.workers} processes are {fewest} for one of them, and a batch is {args.batch}; "
            f"it comes from --num, --workers and --batch: change one, or give --shards"
        )
    return args
