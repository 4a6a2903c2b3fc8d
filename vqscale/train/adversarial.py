"""The loss of reconstructions that is a network with an engine of its own: a discriminator.

The order of a step is that of the published tokenizers of images: one forward pass of the tokenizer, then the
discriminator steps on images and (detached) reconstructions, then the tokenizer steps, with the adversarial loss of the
discriminator as it now is. With accumulation the discriminator steps with the last micro-batch, whose reconstructions
alone meet the new one. `first: tokenizer` is the order of the published SimVQ tokenizers of speech: the tokenizer steps
with the adversarial loss of the discriminator as it was, and the discriminator learns of the same reconstructions after
it. The tokenizer's block is in tokenizer.py.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqscale import config as configuration
from vqscale.config.text import data_of
from vqscale.disk import checkpoint
from vqscale.disk.held import Held, shared
from vqscale.engine.buffers import Buffers
from vqscale.engine.engine import Engine, StepReport
from vqscale.nets import discriminators
from vqscale.nets.discriminators import Answer
from vqscale.nets.weights import check_shapes
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive
from vqscale.tokenizer import saved
from vqscale.tokenizer.export import card_file
from vqscale.train import adversarial_losses as losses
from vqscale.train.beside import Beside
from vqscale.train.config import TokenizerRun
from vqscale.train.config.losses import AdversarialConfig
from vqscale.train.takeover import Takeover

# Of what a checkpoint has of a discriminator, what is no moment.
OWN = ("discriminator/parameter/", "discriminator/buffer/", "discriminator/lecam")


class Discriminator(Beside):
    """The discriminator of a run: its engine, both adversarial losses, and LeCAM's averages. Making one is collective.
    It begins from that in the checkpoint `first`, where init takes it.

    In a checkpoint everything is under discriminator/: the engine's state, and lecam, the averages over all ranks of
    its answers to images, then of its answers to reconstructions.
    """

    name = "discriminator"

    def __init__(self, config: AdversarialConfig, run: TokenizerRun, mesh: Mesh, first: Path | None = None) -> None:
        torch.manual_seed(derive(run.run.seed, "discriminator"))
        net = discriminators.build(config.net, partial(ops.gather, axis=mesh.world)).to(mesh.device)
        steps = max(1, run.run.steps - config.start_step)
        self.averages_2A = torch.zeros(2, config.net.num_answers, device=mesh.device)
        if first is not None and run.init is not None and "discriminator" in run.init.parts:
            _take(first, net, self.averages_2A, mesh)
        super().__init__(Engine(net, {}, run.engine, config.optim or run.optim, mesh, steps))
        self.config, self._mesh, self._accumulation = config, mesh, run.engine.accumulation
        self._answers_2A = torch.zeros_like(self.averages_2A)
        self._report: StepReport | None = None
        self.takeover = Takeover(config)
        self._apart = run.engine.name == "deepspeed" and run.engine.zero_stage == 3

    def trains(self, step: int) -> bool:
        """Whether it learns, and the tokenizer from it, at this step, numbered from 1; the same on every rank."""
        return step > self.config.start_step

    def learn(self, samples: Tensor, recon: Tensor) -> dict[str, Tensor]:
        """Its own block, forward and backward pass and step, on samples and reconstructions; its losses by name, and
        its mean answers `real` and `fake`, for the log. Collective."""
        with self.learning():
            real, fake = self.engine(samples), self.engine(recon.detach())
            parts = self.losses(real, fake)
            self.engine.backward(torch.stack([*parts.values()]).sum())
            self.step(real, fake)
        return {**parts, "real": losses.mean_values(real).mean(), "fake": losses.mean_values(fake).mean()}

    def losses(self, real: list[Answer], fake: list[Answer]) -> dict[str, Tensor]:
        """What it minimises, by name, already weighted, from its answers to images and to reconstructions."""
        found = losses.discriminator(real, fake, self.config.objectives)
        if self.config.lecam_weight:
            found["lecam"] = self.config.lecam_weight * losses.lecam(real, fake, self.averages_2A)
        return found

    def step(self, real: list[Answer], fake: list[Answer]) -> StepReport:
        """Step the engine; at the end of a step its mean answers go into the averages, unless it was skipped.

        LeCAM looks at the averages before its own step, so that micro-batches and ranks make one batch.
        """
        means_2A = torch.stack([losses.mean_values(answers) for answers in (real, fake)])
        self._answers_2A += means_2A / self._accumulation
        report = self.engine.step()
        if report.boundary:
            answers_2A = ops.sum_over(self._answers_2A, self._mesh.world) / self._mesh.world.size
            if report.stepped:
                self.averages_2A = torch.lerp(self.averages_2A, answers_2A, 1 - self.config.lecam_decay)
            self._answers_2A.zero_()
            self._report = report
        return report

    def numbers(self) -> dict[str, float]:
        """Of its last step, for the log; the same on every rank. Nothing before its first step."""
        if self._report is None:
            return {}
        return {"lr": self._report.lr, "grad_norm": self._report.grad_norm, "skipped": self.engine.skipped}

    def distances(
        self, samples: Tensor, recon: Tensor, main: Tensor, last: nn.Parameter, log: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """What it makes the tokenizer minimise, beside `main`: (losses, their weights, numbers for the log) by name.

        With adaptive the weight of the adversarial one follows the ratio of the gradients of `main` and of that loss at
        `last`, the weight of the decoder's last layer; gradients are averaged over the ranks first, so that all have
        one ratio. With `log` gradient_ratio is how long the weighted gradient there is beside that of `main`; it is not
        known where the last layer is frozen, or is taken apart (ZeRO-3).
        """
        fake = self.engine(recon)
        loss = losses.generator(fake, self.config.objectives)
        weight = torch.full((), self.config.weight, device=recon.device)
        numbers = dict[str, Tensor]()
        if self.config.adaptive or (log and last.requires_grad and not self._apart):
            both = torch.stack([torch.autograd.grad(each, last, retain_graph=True)[0] for each in (main, loss)])
            both = ops.sum_over(both.detach(), self._mesh.world) / self._mesh.world.size
            if self.config.adaptive:
                weight = weight * losses.adaptive_ratio(both[0], both[1], self.config.adaptive_limit)
            numbers["gradient_ratio"] = weight * losses.adaptive_ratio(both[1], both[0], math.inf)
        numbers["weight"] = weight
        if not self.config.feature_weight:
            return {"adversarial": loss}, {"adversarial": weight}, numbers
        with torch.no_grad():
            real = self.engine(samples)
        matched = losses.features(real, fake, self.config.objectives)
        weights = {"adversarial": weight, "features": torch.full_like(weight, self.config.feature_weight)}
        return {"adversarial": loss, "features": matched}, weights, numbers

    def held(self) -> tuple[dict[str, Held], dict[str, Tensor], dict[str, Any]]:
        """As every one's (beside.py), and LeCAM's averages."""
        found, rows, facts = super().held()
        return found | {"lecam": shared(self.averages_2A.view(-1))}, rows, facts


@torch.no_grad()
def _take(path: Path, net: nn.Module, averages_2A: Tensor, mesh: Mesh) -> None:
    """Put the discriminator in a checkpoint into `net`, and its averages of answers."""
    contents = checkpoint.read(path)
    wanted: dict[str, Tensor] = {f"parameter/{name}": x for name, x in net.named_parameters()}
    wanted |= {f"buffer/{name}": x for name, x in Buffers(net, mesh).named()}
    wanted["lecam"] = averages_2A.view(-1)
    check_shapes(
        {f"discriminator/{name}": x.shape for name, x in wanted.items()},
        {name: entry["shape"] for name, entry in contents.ranges.items() if name.startswith(OWN)},
        what=f"the discriminator of {path}",
    )
    for name, x in wanted.items():
        x.copy_(contents.whole(f"discriminator/{name}").view_as(x))


def check_taken(run: TokenizerRun) -> None:
    """ValueError unless the run that init names trains a discriminator like this one's."""
    assert run.init is not None, "the config says so"
    path, own = Path(run.init.from_), run.loss.adversarial
    file = None if card_file(path).is_file() else saved.run_file(path)
    if file is None or own is None:
        raise ValueError(
            f"init takes a discriminator, and {path} is a saved tokenizer, which has none: leave discriminator out of "
            "init.parts, or name a run that trained one"
        )
    theirs = configuration.parse(TokenizerRun, dict(data_of(file)), source=str(file), written=True).loss.adversarial
    there = None if theirs is None else configuration.to_dict(theirs.net)
    different = ["there is none"] if there is None else configuration.differences(there, configuration.to_dict(own.net))
    if different:
        raise ValueError(
            f"init takes the discriminator of {path}, and loss.adversarial.net is another one (there -> here): "
            f"{'; '.join(different)}: use the settings there, or leave discriminator out of init.parts"
        )
