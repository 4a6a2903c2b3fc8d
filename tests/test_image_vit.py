"""Vision transformers as the net of a tokenizer of images: sizes, positions, every quantizer, and whole runs, of
pictures in buckets too.
"""

from __future__ import annotations

import io
import json
import math
import signal
from functools import partial
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from PIL import Image
from quantizer_cases import CASES, settings
from shard_files import write_tar

from vqscale import config as configuration
from vqscale.nets.config import grid
from vqscale.nets.config.image_vit import ImageVitConfig
from vqscale.nets.image_vit import Encoder, sines
from vqscale.programs.commands import evaluate
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run

SMALL = {"name": "image_vit", "patch": 4, "width": 16, "encoder_layers": 2, "decoder_layers": 1, "num_heads": 2}
SMALL |= {"mlp_width": 24}


def tokenizer(quantizer: dict | None = None, **net: object) -> Tokenizer:
    asked = {"net": SMALL | net, "quantizer": quantizer or {"name": "ibq", "num_codes": 13, "dim": 6, "init": "normal"}}
    return Tokenizer.from_config(configuration.parse(TokenizerConfig, asked)).eval()


def slowly(encoder: Encoder, image: torch.Tensor, patch: int, heads: int) -> torch.Tensor:
    """The encoder of one image by loops over patches, heads and tokens, in float64."""
    state = {name: x.double() for name, x in encoder.state_dict().items()}
    _, height, width = image.shape
    tokens = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            square = image[:, top : top + patch, left : left + patch].double()
            token = torch.einsum("dchw,chw->d", state["patches.weight"], square) + state["patches.bias"]
            quarter = len(token) // 4
            for place, number in enumerate((top // patch, left // patch)):
                for i in range(quarter):
                    angle = number / 10_000 ** (i / quarter)
                    token[2 * quarter * place + i] += math.sin(angle)
                    token[2 * quarter * place + quarter + i] += math.cos(angle)
            tokens.append(token)
    x = torch.stack(tokens)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for block in range(len(encoder.blocks.blocks)):
        name = f"blocks.blocks.{block}"
        q, k, v = linear(f"{name}.qkv", norm(f"{name}.norm_attention", x)).chunk(3, -1)
        found = []
        for one, two, three in zip(*(part.chunk(heads, -1) for part in (q, k, v)), strict=True):
            found.append(torch.softmax(one @ two.T / one.shape[-1] ** 0.5, -1) @ three)
        x = x + linear(f"{name}.out", torch.cat(found, -1))
        up = linear(f"{name}.up", norm(f"{name}.norm_mlp", x))
        gelu = 0.5 * up * (1 + torch.tanh((2 / math.pi) ** 0.5 * (up + 0.044715 * up**3)))
        x = x + linear(f"{name}.down", gelu)
    return norm("blocks.norm", x).T.unflatten(1, (height // patch, width // patch))


def test_the_encoder_is_its_definition_on_images_that_are_not_square() -> None:
    net = tokenizer().encoder
    image = torch.randn(3, 8, 20)
    expected = slowly(net, image, patch=4, heads=2).detach()
    torch.testing.assert_close(net(image[None])[0].detach().double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["sines", "learned"])
def test_parameters_are_those_of_the_published_blocks(positions: str) -> None:
    net = tokenizer(positions=positions, image_size=32)
    block = 4 * 16 * 17 + 4 * 16 + 16 * 24 + 24 + 24 * 16 + 16
    places = 64 * 16 if positions == "learned" else 0
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert sizes["encoder"] == 48 * 16 + 16 + 2 * block + 32 + places
    assert sizes["decoder"] == block + 32 + 17 * 48 + places
    assert (sizes["quant_conv"], sizes["post_quant_conv"]) == (17 * 6, 7 * 16)


def test_sines_take_any_sides_that_the_patch_divides_and_learned_positions_their_own() -> None:
    net = tokenizer()
    for sides in ((8, 8), (16, 28), (4, 4)):
        images = torch.randn(2, 3, *sides)
        ids = net.encode(images)
        assert ids.shape == (2, sides[0] // 4, sides[1] // 4)
        assert net.decode(ids).shape == images.shape
        torch.testing.assert_close(net.decode(ids), net(images)[0])
    assert len({tuple(row.tolist()) for row in sines(7, 9, 16, torch.device("cpu"))}) == 63
    with pytest.raises(
        ValueError, match=r"samples of 8 x 10 cannot be cut into tokens of 4 x 4, the stride of the net\.p"
    ):
        net.encode(torch.randn(1, 3, 8, 10))
    learned = ImageVitConfig(patch=4, width=16, num_heads=2, positions="learned", image_size=16)
    assert grid(learned, (16, 16)) == (4, 4)
    with pytest.raises(ValueError, match=r"learned positions for samples of 16 x 16 .*, and these are 16 x 20"):
        grid(learned, (16, 20))
    wrong = {"width": 18, "num_heads": 4, "patch": 0}
    assert {key for key, _ in ImageVitConfig(**wrong).problems()} == set(wrong)
    odd = ImageVitConfig(positions="learned", image_size=40, width=18, num_heads=2)
    assert {key for key, _ in odd.problems()} == {"image_size"}


@pytest.mark.parametrize("case", CASES)
def test_every_quantizer_stands_between_the_transformers(case: str, tmp_path: Path) -> None:
    net = tokenizer(settings(case)).train()
    images = torch.randn(2, 3, 8, 12)
    recon, quantized = net(images)
    (recon.square().mean() + sum(quantized.losses.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.encoder.parameters())
    assert len(quantized.ids) == 2 * 2 * 3
    again = Tokenizer.load(net.eval().save(tmp_path / "saved"))
    assert again.fingerprint == net.fingerprint
    assert torch.equal(again.encode(images), net.encode(images))


BUCKETS = [[16, 16], [16, 24], [24, 16]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three aspects, 14 of each to train on, and 12 held out."""
    folder = tmp_path_factory.mktemp("aspects")
    noise = np.random.default_rng(0)
    for name, count in (("train-0", 21), ("train-1", 21), ("val", 12)):
        members = []
        for n in range(count):
            height, width = [(20, 20), (20, 32), (36, 22)][n % 3]
            small = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
            members.append((f"{name}-{n:03d}.png", file.getvalue()))
        write_tar(folder / f"{name}.tar", members)
    return folder


def asked(folder: Path, shards: Path, *overrides: str) -> Path:
    """A run of the small net on pictures in buckets."""
    sources = {
        part: {"medium": "buckets", "buckets": BUCKETS, "shards": str(shards / name), "num_workers": 0}
        | {"index_dir": str(shards / "index")}
        for part, name in (("train", "train-{0..1}.tar"), ("val", "val.tar"))
    }
    lines = [f"tokenizer.net={json.dumps(SMALL)}", *(f"data.{part}={json.dumps(x)}" for part, x in sources.items())]
    return jobs.write_config(folder, shards, *lines, "optim.eps=1e-3", *overrides)


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_in_buckets_that_stops_goes_on_alike_on_other_processes(shards: Path, tmp_path: Path) -> None:
    alone = jobs.finish(asked(tmp_path / "alone", shards))
    moved = asked(tmp_path / "moved", shards)
    stop = partial(jobs.at_call, "vqscale.engine.engine:Engine.backward", 5, partial(jobs.hear, signal.SIGTERM), 0)
    assert jobs.start(moved, before=stop).wait() == [jobs.STOPPED]
    jobs.same_numbers(alone, jobs.finish(moved, world=2))
    rows = jobs.rows(alone)
    assert rows[-1]["val/images"] == 12
    losses = [row["loss/l2"] for row in rows if "loss/l2" in row]
    assert len(losses) == 8
    assert losses[-1] < losses[0]

    out = tmp_path / "out"
    looked = ["tokenizer", str(alone), "--shards", str(shards / "val.tar"), "--workers", "0", "--batch", "5"]
    assert evaluate.main([*looked, "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads((out / "result.json").read_text())
    assert found["data"]["buckets"] == BUCKETS, "as it was trained"
    assert found["numbers"]["images"] == 12
    assert found["numbers"]["psnr"] == pytest.approx(rows[-1]["val/psnr"], abs=1e-3)
    assert evaluate.main([*looked, "--device", "cpu", "--buckets", "32x32", "24x40", "--out", str(out)]) == 0
    assert json.loads((out / "result.json").read_text())["data"]["buckets"] == [[32, 32], [24, 40]]
    assert evaluate.main([*looked, "--device", "cpu", "--image-size", "40"]) == 0
    assert evaluate.main([*looked, "--device", "cpu", "--buckets", "30x32"]) == 2


def test_sides_that_the_net_does_not_take_are_problems_of_the_config(shards: Path, tmp_path: Path) -> None:
    path = asked(tmp_path, shards, "data.train.buckets=[[16, 16], [16, 18]]", "data.val.buckets=[[18, 16]]")
    with pytest.raises(configuration.ConfigError) as error:
        configuration.load(Run, path)
    assert "data.train.buckets: samples of 16 x 18 cannot be cut" in str(error.value)
    assert "data.val.buckets: samples of 18 x 16 cannot be cut" in str(error.value)
    other = asked(tmp_path, shards, "data.val={medium: images, shards: v.tar, image_size: 32}")
    assert configuration.load(Run, other).data.val.shape == (3, 32, 32)
    fixed = asked(tmp_path, shards, "tokenizer.net.positions=learned", "tokenizer.net.image_size=16")
    with pytest.raises(configuration.ConfigError, match="learned positions for samples of 16 x 16"):
        configuration.load(Run, fixed)
