"""A discriminator in whole runs: equal to plain torch at every stage, stopped and resumed.

All kinds of engines run one after the other in the same two processes, because a process takes seconds to start.
"""

from __future__ import annotations

import json

import jobs
import perceptual_files
import pytest
import torch
from torch.nn import functional as F

from vqscale import config as configuration
from vqscale.data.samples import SampleStream
from vqscale.nets.lpips import load as load_lpips
from vqscale.nets.patchgan import PatchGAN
from vqscale.nets.waves.config_discriminator import WaveDiscriminatorConfig
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run
from vqscale.train.config.losses import AdversarialConfig
from vqscale.train.takeover import Takeover
from vqscale.train.tokenizer import train

STEPS = 3
ADVERSARIAL = (
    "loss.adversarial.net={channels: 8, num_layers: 2, norm: group, num_groups: 4}",
    "loss.adversarial.weight=0.5",
    "loss.adversarial.lecam_decay=0.5",
    "loss.adversarial.start_step=1",
    "loss.adversarial.optim={lr: 3.0e-3, betas: [0.5, 0.9], eps: 1.0e-4, schedule: constant}",
)
PLAIN = (
    "tokenizer.quantizer={name: ibq, num_codes: 101, dim: 8, similarity: euclid, entropy_weight: 0, revive_every: 0}",
    "tokenizer.quantizer.init=uniform",
    "optim={lr: 2.0e-3, betas: [0.5, 0.9], eps: 1.0e-4, schedule: constant}",
    "engine.clip_norm=0.5",
    f"run.steps={STEPS}",
    "data.val=null",
)
KINDS = {
    "twin": {"name": "torch"},
    **{f"stage {stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "added up": {"name": "deepspeed", "zero_stage": 2, "accumulation": 2},
    "twin in bf16": {"name": "torch", "precision": "bf16"},
    "stage 2 in bf16": {"name": "deepspeed", "zero_stage": 2, "precision": "bf16"},
}


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory):
    vgg, heads = perceptual_files.write(tmp_path_factory.mktemp("weights"))
    return f"loss.perceptual={{vgg: {vgg}, heads: {heads}, vgg_sha256: null, weight: 0.3}}"


def _train(paths):
    """Runs of these configs one after the other, each to its end."""
    for path in paths:
        config = configuration.load(Run, path)
        assert train(config, Mesh(*config.mesh.resolve(2)))["processes"] == 2


def _soft(x):
    return F.softplus(x)


def reference(config, accumulation=1):
    """The same training by autograd and torch.optim.Adam on one process; the last tensors, named as saved."""
    adversarial = config.loss.adversarial
    net = Tokenizer.from_config(config.tokenizer, Mesh(), config.run.seed)
    torch.manual_seed(derive(config.run.seed, "discriminator"))
    judge = PatchGAN(adversarial.net)
    files = config.loss.perceptual
    lpips = None if files is None else load_lpips(files.vgg, files.heads, vgg_sha256=None)
    adam = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.9), eps=1e-4)
    its_adam = torch.optim.Adam(judge.parameters(), lr=3e-3, betas=(0.5, 0.9), eps=1e-4)
    stream = SampleStream(
        config.data.train, config.data.batch // accumulation, 0, 1, seed=derive(config.run.seed, "data")
    )
    batches, m_real, m_fake = stream.batches(0), torch.zeros(()), torch.zeros(())
    for step in range(STEPS):
        adam.zero_grad()
        its_adam.zero_grad()
        answers = []
        for micro in range(accumulation):
            images = next(batches).samples
            recon, quantized = net(images)
            loss = (recon - images).square().mean() + (0.3 * lpips(images, recon).mean() if lpips else 0)
            if step >= 1:
                real, fake = judge.main(images), judge.main(recon.detach())
                its_loss = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
                regular = (real - m_fake).clamp(min=0).square().mean() + (m_real - fake).clamp(min=0).square().mean()
                gradients = torch.autograd.grad((its_loss + 0.05 * regular) / accumulation, list(judge.parameters()))
                for p, gradient in zip(judge.parameters(), gradients, strict=True):
                    p.grad = gradient if p.grad is None else p.grad + gradient
                answers.append((real.mean().item(), fake.mean().item()))
                if micro == accumulation - 1:
                    torch.nn.utils.clip_grad_norm_(judge.parameters(), 0.5)
                    its_adam.step()
                    m_real, m_fake = (
                        0.5 * m + 0.5 * torch.tensor([pair[i] for pair in answers]).mean()
                        for i, m in enumerate((m_real, m_fake))
                    )
                part = _soft(-judge.main(recon).mean(dim=(1, 2, 3))).mean()
                weight = 0.5
                if adversarial.adaptive:
                    last = net.decoder.conv_out.weight
                    one, other = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (loss, part))
                    weight = weight * (one / (other + 1e-4)).item()
                loss = loss + weight * part
            loss = loss + 0.01 * sum(quantized.losses.values())
            for p, gradient in zip(
                net.parameters(), torch.autograd.grad(loss / accumulation, list(net.parameters())), strict=True
            ):
                p.grad = gradient if p.grad is None else p.grad + gradient
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        adam.step()
    found = {}
    for prefix, module, optimizer in (("", net, adam), ("discriminator/", judge, its_adam)):
        for name, p in module.named_parameters():
            where = "rows/" if name == "quantizer.codebook.rows" else prefix
            found[f"{where}parameter/{name}"] = p.detach()
            found[f"{where}exp_avg/{name}"] = optimizer.state[p]["exp_avg"]
    return found | {"discriminator/lecam": torch.stack([m_real, m_fake])}


def _compare(run, truth, step=STEPS):
    saved = jobs.tensors(run, step)
    assert set(truth) <= set(saved)
    for name, tensor in truth.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.dist
@pytest.mark.slow
def test_every_stage_equals_plain_torch(tmp_path, tiny_shards, perceptual, ranks):
    paths = {}
    for kind, engine in KINDS.items():
        options = [f"engine.{key}={value}" for key, value in engine.items()]
        paths[kind] = jobs.write_config(tmp_path / kind, tiny_shards, *PLAIN, *ADVERSARIAL, *options)
    adaptive = [*PLAIN, *ADVERSARIAL, perceptual, "loss.adversarial.adaptive=true"]
    for kind in ("twin", "stage 2"):
        options = [f"engine.{key}={value}" for key, value in KINDS[kind].items()]
        paths[f"{kind}, adaptive"] = jobs.write_config(tmp_path / f"{kind} a", tiny_shards, *adaptive, *options)
    ranks(2, _train, list(paths.values()), timeout_s=120)
    runs = {kind: path.parent / "run" for kind, path in paths.items()}

    config = configuration.load(Run, paths["twin"])
    truth = reference(config)
    for kind in ("twin", "stage 0", "stage 1", "stage 2", "stage 3"):
        _compare(runs[kind], truth)
    _compare(runs["added up"], reference(config, 2))
    truth = reference(configuration.load(Run, paths["twin, adaptive"]))
    for kind in ("twin, adaptive", "stage 2, adaptive"):
        _compare(runs[kind], truth)
    _compare(runs["stage 2 in bf16"], jobs.tensors(runs["twin in bf16"], STEPS))
    _check_rows(jobs.rows(runs["stage 2, adaptive"]), jobs.tensors(runs["stage 2, adaptive"], STEPS))


def _check_rows(rows, saved):
    before, *after = rows
    its_names = {
        f"discriminator/{name}"
        for name in ("hinge", "lecam", "real", "fake", "weight", "gradient_ratio", "lr", "grad_norm", "skipped")
    }
    assert not its_names & before.keys()
    for row in after:
        assert its_names | {"loss/adversarial", "loss/lpips", "loss/l2", "loss/commitment"} <= row.keys()
        assert row["discriminator/lr"] == 3e-3
        assert row["discriminator/gradient_ratio"] == pytest.approx(0.5, rel=0.05), "an adaptive weight makes it weight"
        parts = row["loss/l2"] + 0.3 * row["loss/lpips"] + row["discriminator/weight"] * row["loss/adversarial"]
        others = row.keys() - {"loss/l2", "loss/lpips", "loss/adversarial"}
        parts += 0.01 * sum(row[name] for name in others if name.startswith("loss/"))
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert saved["discriminator/lecam"].abs().min() > 0


def _resumed(paths, steps):
    """Each run to step 2, then to the last one by a fresh start of each of the kinds."""
    for path, kinds in paths:
        for last, kind in zip((2, steps), kinds, strict=True):
            options = [f"engine.{key}={value}" for key, value in KINDS[kind].items()]
            config = configuration.load(Run, path, [f"run.steps={last}", *options])
            assert train(config, Mesh(*config.mesh.resolve(2)))["steps"] == last


@pytest.mark.dist
@pytest.mark.slow
def test_a_discriminator_goes_on_where_it_was_at_any_stage(tmp_path, tiny_shards, ranks):
    """Both engines, LeCAM and the average of weights; without clipping, norms (summed in parts) change no bit."""
    more = ["loss.adversarial.net.norm=batch", "average.decay=0.9", "run.checkpoint_every=2", "run.steps=4"]
    more += ["engine.clip_norm=0"]
    paths = [jobs.write_config(tmp_path / str(i), tiny_shards, *PLAIN, *ADVERSARIAL, *more) for i in range(4)]
    kinds = [("twin", "twin"), ("stage 2", "stage 2"), ("stage 3", "twin"), ("twin", "stage 3")]
    whole = jobs.write_config(tmp_path / "whole", tiny_shards, *PLAIN, *ADVERSARIAL, *more)
    ranks(2, _train, [whole])
    ranks(2, _resumed, list(zip(paths, kinds, strict=True)), 4, timeout_s=120)
    jobs.same_bits(whole.parent / "run", paths[0].parent / "run", 4)
    expected = jobs.tensors(whole.parent / "run", 4)
    for path in paths:
        found = jobs.tensors(path.parent / "run", 4)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items()), path
    facts = json.loads((whole.parent / "run" / "checkpoints" / "0000000004" / "facts.json").read_text())
    assert facts["discriminator"]["boundaries"] == 3  # of 4 steps: the first was the tokenizer's alone


def test_what_a_discriminator_cannot_learn_with_is_refused(tmp_path, tiny_shards):
    options = ["loss.adversarial.adaptive=true", "engine.name=deepspeed", "engine.zero_stage=3", "run.compile=true"]
    options += ["loss.adversarial.net.num_layers=3", "loss.adversarial.weight=0", "average.decay=1.0"]
    options += ["loss.perceptual={vgg: a, heads: b, vgg_sha256: xyz}"]
    with pytest.raises(configuration.ConfigError) as error:
        configuration.load(Run, jobs.write_config(tmp_path, tiny_shards, *PLAIN, *ADVERSARIAL, *options))
    message = str(error.value)
    for part in (
        "adaptive asks for a gradient at the decoder's last layer, and engine.zero_stage 3 takes that layer apart",
        "run.compile does not go with engine.zero_stage 3",
        "the discriminator patchgan has no answer for samples with a side of 16 (data.train.image_size), it needs 24",
        "weight is 0",
        "decay is 1.0",
        "vgg_sha256 is 'xyz', no digits of a sha256",
    ):
        assert part in message, message


def _row(loss, ratio=0.1):
    numbers = {"hinge": loss, "real": 2.5, "fake": -2.0, "gradient_ratio": ratio}
    return {f"discriminator/{name}": x for name, x in numbers.items()}


def test_a_takeover_is_told_once_when_it_has_lasted_and_again_when_it_is_back():
    watching = Takeover(AdversarialConfig())
    assert watching.notes(1, {"loss": 1.0}) == [], "before start_step there is nothing to say"
    said = {step: watching.notes(step, _row(0.09 if step != 25 else 0.11)) for step in range(1, 41)}
    assert {step: len(notes) for step, notes in said.items() if notes} == {10: 1, 35: 1}
    assert (
        "up to step 10 the discriminator was sure for 10 logged steps (its loss is 9.0% of an undecided" in said[10][0]
    )
    assert "answers to samples 2.50, to reconstructions -2.00" in said[10][0]

    said = [Takeover(AdversarialConfig()).notes(step, _row(0.5, 1.5)) for step in range(20)]
    assert said == [[]] * 20, "each of another run"
    watching = Takeover(AdversarialConfig())
    said = [note for step in range(20) for note in watching.notes(step, _row(0.5, 1.5))]
    assert len(said) == 1
    assert "longer than that of all other losses for 10 logged steps (now 1.50 times)" in said[0]
    assert "a smaller weight, or adaptive: true" in said[0]


def test_the_losses_of_a_discriminator_of_waves_count_together():
    parts = WaveDiscriminatorConfig().objectives
    undecided = {
        kind: sum(x.discriminator_weight for x in parts if x.discriminator == kind)
        for kind in ("hinge", "least_squares")
    }
    undecided["least_squares"] /= 4  # (1/4 + 1/4) / 2 for one answer of a half
    rows = {f"discriminator/{kind}": 0.09 * x for kind, x in undecided.items()} | {
        "discriminator/real": 2.0,
        "discriminator/fake": 0.0,
    }
    watching = Takeover(AdversarialConfig(net=WaveDiscriminatorConfig()))
    assert [len(watching.notes(step, rows)) for step in range(11)] == [0] * 9 + [1, 0]
    one_wins = {**rows, "discriminator/hinge": 0.2 * undecided["hinge"]}
    assert not any(watching.notes(step, one_wins) for step in range(20)), "one part that is sure is not all"


def test_a_run_whose_discriminator_wins_says_so(tmp_path, tiny_shards, capsys):
    more = ["loss.adversarial.optim.lr=0.02", "loss.adversarial.lecam_weight=0", "optim.lr=1.0e-6"]
    more += ["run.log_every=1", "run.steps=20"]
    train(configuration.load(Run, jobs.write_config(tmp_path, tiny_shards, *PLAIN, *ADVERSARIAL, *more)), Mesh())
    assert "the discriminator was sure for 10 logged steps" in capsys.readouterr().out
