"""A frozen vision transformer by the names of DINOv2, a discriminator on its features, and codes aligned with them."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import jobs
import pytest
import torch
import vision_files
from test_image_vit import SMALL

from vqscale import config as configuration
from vqscale.nets import discriminators, vision
from vqscale.nets.config.vision import FeatureDiscriminatorConfig, VisionConfig
from vqscale.parallel.mesh import Mesh
from vqscale.plan.tokenizer import plan
from vqscale.programs.commands import train as train_command
from vqscale.train.alignment import Alignment
from vqscale.train.config import Run
from vqscale.train.tokenizer import train


@pytest.fixture
def config(tmp_path: Path) -> VisionConfig:
    return VisionConfig(**vision_files.write(tmp_path / "vision.safetensors"))


def slowly(images: torch.Tensor, layer: int) -> torch.Tensor:
    """Features of images of 20 pixels from the published names, in float64: branches scaled by ls1 and ls2."""
    state = {name: x.double() for name, x in vision_files.state().items()}
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images.double() / 2 + 0.5 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), 1, 8), x.flatten(1, 2)], 1) + state["pos_embed"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        spread = x.var(-1, correction=0, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for n in range(layer):
        name = f"blocks.{n}"
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).chunk(3, -1)
        heads = [
            torch.softmax(a @ b.transpose(1, 2) / 2, -1) @ c
            for a, b, c in zip(*(part.chunk(2, -1) for part in (q, k, v)), strict=True)
        ]
        x = x + state[f"{name}.ls1.gamma"] * linear(f"{name}.attn.proj", torch.cat(heads, -1))
        up = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
        x = x + state[f"{name}.ls2.gamma"] * linear(f"{name}.mlp.fc2", up * (1 + torch.erf(up / 2**0.5)) / 2)
    return norm("norm", x)[:, 1:].transpose(1, 2).unflatten(2, (5, 5))


def test_features_are_those_of_the_published_definition_after_every_block(config: VisionConfig) -> None:
    images = torch.rand(2, 3, 20, 20) * 2 - 1
    first, third = vision.load(config)(images, (5, 5), (1, 3))
    torch.testing.assert_close(first.double(), slowly(images, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(third.double(), slowly(images, 3), atol=1e-5, rtol=1e-4)


def cubic(x: float) -> float:
    """The weight of a pixel at this distance, with a = -3/4."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_positions_of_another_grid_are_interpolated_as_published(config: VisionConfig) -> None:
    model = vision.load(config)
    assert model(torch.randn(1, 3, 40, 70), (3, 7), [2])[0].shape == (1, 8, 3, 7)
    weights = []
    for places in (3, 7):
        rows = torch.zeros(places, 5)
        for place in range(places):
            at = (place + 0.5) * 5 / (places + 0.1) - 0.5
            for near in range(int(at // 1) - 1, int(at // 1) + 3):
                rows[place, min(max(near, 0), 4)] += cubic(at - near)
        weights.append(rows)
    square = vision_files.state()["pos_embed"][0, 1:].view(5, 5, 8)
    expected = torch.einsum("hi,wj,ijd->hwd", *weights, square).flatten(0, 1)
    found = model._positions((3, 7))
    torch.testing.assert_close(found[1:], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(found[0], vision_files.state()["pos_embed"][0, 0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm.bias": None}, r"1 missing: norm\.bias"),
        ({"register_tokens": torch.zeros(1, 4, 8)}, "1 unknown: register_tokens"),
        ({"pos_embed": torch.zeros(1, 17, 8)}, r"pos_embed is \(1, 17, 8\) and not \(1, 26, 8\)"),
    ],
)
def test_a_file_of_another_network_is_refused_before_and_when_it_is_read(tmp_path: Path, changes, said: str) -> None:
    config = VisionConfig(**vision_files.write(tmp_path / "other.safetensors", **changes))
    for reads in (vision.check, vision.load):
        with pytest.raises(ValueError, match=said):
            reads(config)
    with pytest.raises(ValueError, match="does not exist, and nothing is downloaded"):
        vision.check(VisionConfig("nowhere.safetensors"))


def test_a_discriminator_on_features_trains_its_small_networks_alone(config: VisionConfig) -> None:
    asked = FeatureDiscriminatorConfig(config, layers=(1, 3), stride=4, channels=5)
    net = discriminators.build(asked)
    assert sum(p.numel() for p in net.parameters()) == 2 * (9 * 5 + (25 * 9 + 5) + 6)
    assert not any("vision" in name for name in net.state_dict())
    images = torch.randn(2, 3, 16, 24, requires_grad=True)
    answers = net(images)
    assert [answer.values.shape for answer in answers] == [(2, 1, 4, 6)] * 2
    sum(answer.values.sum() for answer in answers).backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is not None for p in net.parameters())
    assert net._vision._vision.positions.grad is None
    wrong = FeatureDiscriminatorConfig(config, layers=(3, 1), stride=0)
    assert {key for key, _ in wrong.problems()} == {"layers", "stride"}


def asked(folder: Path, shards: Path, *overrides: str) -> Path:
    """A run of the small net with both losses."""
    seen = vision_files.write(folder / "vision.safetensors")
    adversarial = {"net": {"name": "features", "vision": seen, "layers": [1, 3], "stride": 4, "channels": 4}}
    adversarial |= {"start_step": 2}
    alignment = {"vision": seen, "tokens_per_feature": 2, "hidden": 6, "layer": 2}
    losses = (f"loss.adversarial={json.dumps(adversarial)}", f"loss.alignment={json.dumps(alignment)}")
    net = (f"tokenizer.net={json.dumps(SMALL)}", "optim.eps=1e-3", "run.steps=6")
    return jobs.write_config(folder, shards, *net, *losses, *overrides)


def test_codes_are_drawn_to_features_through_a_map_that_learns(tmp_path: Path, tiny_shards: Path) -> None:
    config = configuration.load(Run, asked(tmp_path, tiny_shards, "optim.lr=0.03", "optim.warmup_steps=0"))
    assert config.loss.alignment is not None
    alignment = Alignment(config.loss.alignment, config, 8, Mesh())
    side = jobs.SIDE
    images, z_ND = torch.rand(2, 3, side, side) * 2 - 1, torch.randn(2 * (side // 4) ** 2, 8, requires_grad=True)
    distances = []
    for _ in range(30):
        value = alignment.distance(images, z_ND)
        (gradient,) = torch.autograd.grad(value, z_ND)
        distances.append(value.item())
    assert 0 < distances[-1] < 0.8 * distances[0]
    assert gradient.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in alignment.engine.module.parameters())
    # the value is of the means of 2 x 2 codes, and of features on their grid
    mapped = alignment.engine.module(z_ND.view(2, side // 8, 2, side // 8, 2, 8).mean((2, 4)))
    features = vision.load(config.loss.alignment.vision)(images, (side // 8, side // 8), [2])[0].movedim(1, -1)
    again = alignment.distance(images, z_ND)
    cosine = torch.nn.functional.cosine_similarity(mapped, features, dim=-1).mean()
    assert abs(1 - cosine.item() - again.item()) < 0.1


def test_what_has_no_features_is_a_problem_of_the_config(tmp_path: Path, tiny_shards: Path) -> None:
    def problems(*overrides: str) -> str:
        with pytest.raises(configuration.ConfigError) as error:
            configuration.load(Run, asked(tmp_path, tiny_shards, *overrides))
        return str(error.value)

    side = jobs.SIDE // 4
    said = problems("loss.alignment.tokens_per_feature=3", "loss.alignment.layer=4")
    assert (
        f"loss.alignment.tokens_per_feature: {side} x {side} tokens of a sample cannot be cut into squares of 3" in said
    )
    assert "loss.alignment.layer: layer is 4, and vision has blocks 1 to 3" in said
    assert "loss.alignment: alignment changes the codes" in problems("trained=[decoder]", "init={from: somewhere}")
    config = configuration.load(Run, asked(tmp_path, tiny_shards))
    priced = plan(config, 2).parameters  # without the file
    assert priced["map of alignment"] == 9 * 6 + 7 * 8
    assert priced["discriminator"] == 2 * (9 * 4 + (16 * 9 + 4) + 5)
    frozen = sum(x.numel() for name, x in vision_files.state().items() if "gamma" not in name and name != "mask_token")
    assert priced["vision model of alignment (frozen)"] == priced["vision model of discriminator (frozen)"] == frozen
    vision_files.write(tmp_path / "vision.safetensors", pos_embed=torch.zeros(1, 5, 8))
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 5, 8\) and not \(1, 26, 8\)"):
        train_command._check_images(config)


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_with_both_stops_and_goes_on_alike_on_two_processes_and_with_zero(
    tmp_path: Path, tiny_shards: Path
) -> None:
    alone = jobs.finish(asked(tmp_path / "alone", tiny_shards))
    zero = ("engine.name=deepspeed", "engine.zero_stage=2")
    moved = asked(tmp_path / "moved", tiny_shards, *zero)
    stop = partial(jobs.at_call, "vqscale.train.alignment:Alignment.distance", 4, partial(jobs.hear, signal.SIGTERM), 0)
    assert jobs.start(moved, world=2, before=stop).wait() == [jobs.STOPPED] * 2
    jobs.same_numbers(alone, jobs.finish(moved, world=2))
    rows = [row for row in jobs.rows(alone) if "loss/alignment" in row]
    assert len(rows) == 6
    assert all(0 < row["loss/alignment"] < 2 for row in rows)
    assert "discriminator/weight" in rows[-1]
    kept = jobs.tensors(alone, 6)
    assert any("alignment/" in name for name in kept)
    assert not any("vision" in name for name in kept)


STAGES = {"twin": ("torch", 0), "stage 1": ("deepspeed", 1), "stage 3": ("deepspeed", 3)}


def _train(paths: list[Path]) -> None:
    for path in paths:
        config = configuration.load(Run, path)
        train(config, Mesh(*config.mesh.resolve(2)))


@pytest.mark.slow
@pytest.mark.dist
def test_both_losses_are_alike_at_every_stage_and_in_bf16(tmp_path: Path, tiny_shards: Path, ranks) -> None:
    paths = {}
    for precision in ("fp32", "bf16"):
        for kind, (name, stage) in STAGES.items():
            engine = (f"engine.name={name}", f"engine.zero_stage={stage}", f"engine.precision={precision}")
            short = ("run.steps=3", "loss.adversarial.start_step=1", "data.val=null", *engine)
            paths[kind, precision] = asked(tmp_path / kind / precision, tiny_shards, *short)
    ranks(2, _train, list(paths.values()), timeout_s=240)
    runs = {kind: path.parent / "run" for kind, path in paths.items()}
    for kind, precision in runs:
        twin = jobs.tensors(runs["twin", precision], 3)
        assert any(name.startswith("alignment/exp_avg/") for name in twin)
        assert any(name.startswith("discriminator/exp_avg/") for name in twin)
        there = jobs.tensors(runs[kind, precision], 3)
        assert twin.keys() == there.keys()
        for name, x in twin.items():
            assert torch.allclose(x.double(), there[name].double(), atol=1e-5, rtol=1e-5), (
                f"{kind}, {precision}: {name}"
            )
    whole, rounded = (jobs.rows(runs["stage 3", precision])[-1] for precision in ("fp32", "bf16"))
    for name in ("loss/alignment", "loss/adversarial"):
        assert 0 < abs(whole[name] - rounded[name]) < 0.02 * whole[name]
