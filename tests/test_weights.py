"""Published weights: what is read, and what each kind of bad file is told."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from vqscale.nets.weights import load_strictly, read_state

WHAT, WHERE = "the test's weights", "get them from the test"


def _read(path, **more):
    return read_state(path, what=WHAT, where=WHERE, **more)


@pytest.fixture
def state():
    return {"a.weight": torch.randn(3, 2), "a.bias": torch.arange(3.0)}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
def test_files_are_read_to_the_bit_and_checked(tmp_path, state, suffix):
    path = tmp_path / f"file{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if suffix == ".ckpt" else state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for prefix in (None, digest[:8], digest.upper()):
        found = _read(path, sha256=prefix)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], x) for name, x in state.items())
    other = "0" * 8 if digest[0] != "0" else "1" * 8
    with pytest.raises(ValueError, match=rf"sha256 of .* is {digest[:8]}.*{other}.* is expected.*{WHERE}"):
        _read(path, sha256=other)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"{WHAT}: .*cannot be read as weights.*cut off.*{WHERE}"):
        _read(path)


def test_what_is_no_file_of_weights(tmp_path, state):
    with pytest.raises(ValueError, match=rf"does not exist, and nothing is downloaded at run time: {WHERE}"):
        _read(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is no file"):
        _read(tmp_path)
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ends in none of \.pth"):
        _read(tmp_path / "weights.npz")
    torch.save({"a": torch.ones(1), "step": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds a int under 'step' and not tensors by name"):
        _read(tmp_path / "a.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list and not tensors"):
        _read(tmp_path / "list.pt")
    torch.save(nn.Linear(2, 3), tmp_path / "module.pt")  # a pickle that could run anything
    with pytest.raises(ValueError, match="it holds more than tensors"):
        _read(tmp_path / "module.pt")


def test_loading_is_all_or_nothing(state):
    net = nn.ModuleDict({"a": nn.Linear(2, 3)})
    before = {name: x.clone() for name, x in net.state_dict().items()}
    wrong = {"a.weight": torch.randn(3, 3), **{f"b.{i}": torch.ones(1) for i in range(5)}}
    with pytest.raises(ValueError, match=WHAT) as error:
        load_strictly(net, wrong, what=WHAT)
    message = str(error.value)
    assert "1 missing: a.bias" in message
    assert "5 unknown: b.0, b.1, b.2, ..." in message
    assert "1 of another shape: a.weight is (3, 3) and not (3, 2)" in message
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    load_strictly(net, state, what=WHAT)
    assert torch.equal(net["a"].weight, state["a.weight"])
    assert torch.equal(net["a"].bias, state["a.bias"])
