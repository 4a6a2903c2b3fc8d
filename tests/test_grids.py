"""Ids of one side and of three: rotary embedding, prior and token cache know sides, not rows and columns."""

from __future__ import annotations

import numpy as np
import pytest
import token_caches as caches
import torch

from vqscale import config as configuration
from vqscale import priors
from vqscale.config import ConfigError
from vqscale.data.tokens.format import open_ids, read_card
from vqscale.data.tokens.stream import Cache
from vqscale.nets.config import ConvConfig, grid
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.nets.transformer import rotary
from vqscale.priors.config import PriorConfig

NET = {"width": 24, "num_layers": 1, "num_heads": 2, "ffn_multiple": 8}


def test_the_places_of_one_side_turn_as_those_of_a_sequence():
    turns = rotary(TransformerConfig(**NET, rotary_base=100.0), (5,))[1:]
    for place in range(5):
        angles = torch.tensor([place * 100.0 ** (-2 * i / 12) for i in range(6)])
        assert torch.allclose(turns[place], torch.stack([angles.cos(), angles.sin()], -1), atol=1e-6)


def test_each_of_three_sides_turns_its_third_of_the_pairs_and_the_last_is_the_fastest():
    turns = rotary(TransformerConfig(**NET), (2, 3, 4))[1:].unflatten(0, (2, 3, 4))
    for side, part in enumerate(turns.split(2, dim=3)):
        others = [dim for dim in range(3) if dim != side]
        assert all((part.diff(dim=dim) == 0).all() for dim in others)
        assert (part.diff(dim=side) != 0).any()


@pytest.mark.parametrize("sides", [(5,), (2, 3, 2)])
def test_a_prior_models_and_draws_ids_of_any_number_of_sides(sides):
    prior = priors.build({"name": "autoregressive", "num_codes": 7, "grid": list(sides), "num_classes": 2, "net": NET})
    ids = torch.randint(7, (3, *sides))
    assert prior(ids, torch.tensor([0, 1, -1])).loss.isfinite()
    drawn = prior.eval().sample(torch.tensor([0, 1]), numbers_B=torch.arange(2), seed=1)
    assert drawn.shape == (2, *sides)
    assert set(drawn.flatten().tolist()) <= set(range(7))


def test_pairs_that_do_not_divide_by_the_sides_are_refused():
    with pytest.raises(
        ConfigError, match=r"6 pairs to turn, which do not divide by the 4 sides of grid \[1, 1, 1, 2\]"
    ):
        configuration.parse(PriorConfig, {"num_codes": 7, "grid": [1, 1, 1, 2], "net": NET})


@pytest.mark.parametrize(("sides", "num_ids"), [((6,), 1), ((6,), 2), ((2, 3, 2), 1)])
def test_a_cache_of_any_number_of_sides_holds_what_was_written(tmp_path, sides, num_ids):
    caches.write(tmp_path, grid=sides, num_ids=num_ids)
    card = read_card(tmp_path)
    assert card is not None
    assert card.grid == sides
    wanted = np.stack([caches.known_ids(card, number) for number in range(card.num_images)])
    assert np.array_equal(open_ids(tmp_path)[...], wanted)
    cache = Cache(tmp_path)
    cache.expect(grid=sides, num_ids=num_ids)
    with pytest.raises(
        ValueError, match=r"it has \[.*\] positions along the sides \(grid\), but expected are \[1, 6\]"
    ):
        cache.expect(grid=(1, 6))


def test_a_net_tells_the_grid_of_a_sample_and_refuses_what_it_cannot_cut():
    net = ConvConfig(multipliers=(1, 2, 4))
    assert grid(net, (8, 12)) == (2, 3)
    with pytest.raises(
        ValueError, match="samples of 8 x 10 cannot be cut into tokens of 4 x 4, the stride of the 3 levels"
    ):
        grid(net, (8, 10))
    with pytest.raises(ValueError, match=r"takes samples of 2 sides, and these have 1 \(8\)"):
        grid(net, (8,))
