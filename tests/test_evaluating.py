"""Evaluation mode is for a while, and gives every part of a module back the mode that it had."""

from __future__ import annotations

import pytest
import torch
from jobs import SIDE
from saved_runs import images, small
from torch import nn

from vqscale import priors
from vqscale.data.config import ImagesConfig
from vqscale.data.samples import SampleStream
from vqscale.nets.mode import evaluating
from vqscale.parallel.mesh import Mesh
from vqscale.programs import score
from vqscale.show.board import Board
from vqscale.train import evaluate


def _mixed(module):
    """A module in training whose first part is frozen; returns what says the mode of every part."""
    module.train()
    next(module.children()).eval()
    return lambda: [part.training for part in module.modules()]


def test_every_part_has_its_own_mode_again():
    module = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Dropout()), nn.Sequential(nn.Dropout(), nn.Dropout()))
    modes = _mixed(module)
    module[0][1].train()  # below a part that is not
    before = modes()
    with evaluating(module):
        assert not any(modes())
    assert modes() == before
    with pytest.raises(KeyboardInterrupt), evaluating(module):
        raise KeyboardInterrupt
    assert modes() == before


@pytest.fixture(scope="module")
def stream(tiny_shards):
    source = {"image_size": SIDE, "num_workers": 0, "index_dir": str(tiny_shards / "index")}
    return SampleStream(ImagesConfig(shards=str(tiny_shards / "val.tar"), **source), 4, train=False)


LOOKS = {
    "encode": lambda tokenizer, stream, folder: tokenizer.encode(images(side=SIDE)),
    "decode": lambda tokenizer, stream, folder: tokenizer.decode(torch.zeros(1, 2, 2, dtype=torch.int64)),
    "score": lambda tokenizer, stream, folder: score.score(tokenizer, stream, Mesh()),
    "evaluate": lambda tokenizer, stream, folder: evaluate.evaluate(
        tokenizer, tokenizer, stream, Mesh(), most=0, board=Board(folder, rank=1), step=1
    ),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_who_looks_at_a_tokenizer_in_training_leaves_it_as_it_was(look, stream, tmp_path):
    tokenizer = small()
    modes = _mixed(tokenizer)
    before = modes()
    look(tokenizer, stream, tmp_path)
    assert modes() == before
    assert len(set(before)) == 2


def test_a_prior_that_draws_is_left_as_it_was():
    net = {"width": 16, "num_layers": 2, "num_heads": 2, "ffn_multiple": 16}
    prior = priors.build({"name": "autoregressive", "num_codes": 7, "grid": [2, 2], "num_classes": 3, "net": net})
    modes = _mixed(prior)
    before = modes()
    prior.sample(torch.tensor([1]), numbers_B=torch.tensor([0]))
    assert modes() == before
    assert len(set(before)) == 2
