"""What cannot be loaded as a tokenizer says the rule, where the thing lies, and what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import forks
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from saved_runs import small, write_run

from vqscale.disk import manifest
from vqscale.tokenizer.export import CARD, WEIGHTS
from vqscale.tokenizer.model import Tokenizer


@pytest.fixture
def saved(tmp_path):
    return small().save(tmp_path / "saved")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", small())


def refused(path, match, **settings):
    with pytest.raises(ValueError, match=match) as caught:
        Tokenizer.load(path, **settings)
    assert str(path) in str(caught.value) or settings
    return str(caught.value)


def change_card(folder, **settings):
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({key: x for key, x in (card | settings).items() if x is not None}))


def replace_weights(folder, change):
    """Write other tensors, and a card that believes in them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    change_card(folder, weights={"file": WEIGHTS, **manifest.seal(folder / WEIGHTS)})


def test_no_tokenizer_there(tmp_path):
    refused(tmp_path / "nothing", r"does not exist \(looked from .*\): give a run folder, a folder NNN")
    refused(tmp_path, r"has neither card.json nor run.yaml nor manifest.json: give a run folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is no folder")


def test_weights_that_do_not_exist_have_no_name(saved):
    refused(saved, r"'ema'.*'average' and 'parameters'", weights="ema")


def test_truncated_exchanged_or_absent_weights(saved):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:-100])
    refused(saved, rf"has {len(whole) - 100} bytes, and .*card.json says {len(whole)}: .* copy the folder again")
    (saved / WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(saved, r"as sha256, and .* exchanged after it was written")
    (saved / WEIGHTS).unlink()
    refused(saved, "does not exist: put it back")


def test_a_file_that_is_not_safetensors(saved):
    (saved / WEIGHTS).write_bytes(b"\xff" * 100)
    change_card(saved, weights={"file": WEIGHTS, **manifest.seal(saved / WEIGHTS)})
    refused(saved, r"model.safetensors cannot be read \(.*\): copy the folder again")


def test_an_unfinished_folder(saved):
    (saved / CARD).unlink()
    refused(saved, "has weights and no card.json: writing it was not finished")


def test_cards_that_cannot_be_used(saved):
    (saved / CARD).write_text("{")
    refused(saved, r"card.json cannot be read")
    (saved / CARD).write_text("[]")
    refused(saved, "is the card of 'list'")
    (saved / CARD).write_text('{"format": "something"}')
    refused(saved, "is the card of 'something' and not of a 'vqscale tokenizer'")


def test_a_card_of_a_newer_version(saved):
    change_card(saved, version=2)
    refused(saved, "has version 2, and this code reads version 1: use the vqscale that wrote it")


def test_a_card_that_lacks_its_config(saved):
    change_card(saved, config=None)
    refused(saved, "lacks config: save the tokenizer again")


def test_a_config_of_another_time(saved):
    card = json.loads((saved / CARD).read_text())
    change_card(saved, config={**card["config"], "latent_nrom": "rms"})
    refused(saved, "latent_nrom.*did you mean.*latent_norm")


def test_names_and_shapes_that_are_not_those_of_the_network(saved):
    def change(tensors):
        del tensors["encoder.conv_in.weight"], tensors["decoder.conv_out.bias"]
        tensors["encoder.extra"] = torch.zeros(1)
        tensors["quantizer.codebook.rows"] = torch.zeros(13, 5)

    replace_weights(saved, change)
    message = refused(saved, "2 missing: decoder.conv_out.bias, encoder.conv_in.weight")
    assert "1 unknown: encoder.extra" in message
    assert "quantizer.codebook.rows is (13, 5) and not (13, 4)" in message


def test_another_number_of_codes(run):
    asked = yaml.safe_load((run / "run.yaml").read_text())
    asked["tokenizer"]["quantizer"]["num_codes"] = 14
    (run / "run.yaml").write_text(yaml.safe_dump(asked))
    refused(run, r"has 14 rows in this configuration, but 13 in .*: change the number of codes")


def test_another_network(run):
    asked = yaml.safe_load((run / "run.yaml").read_text())
    asked["tokenizer"]["net"]["num_blocks"] = 2
    (run / "run.yaml").write_text(yaml.safe_dump(asked))
    refused(
        run,
        r"0000000007: the \d+ tensors of the file are not the \d+ of the network \(.* missing: decoder.up.0.block.2",
    )
    asked["tokenizer"]["net"] |= {"num_blocks": 1, "mid_attention": False}
    (run / "run.yaml").write_text(yaml.safe_dump(asked))
    refused(run, r"20 unknown: .*mid.attn_1")


def test_a_run_without_a_checkpoint(run):
    shutil.rmtree(run / "checkpoints")
    refused(run, r"has no whole checkpoint in .*: train it until it has saved once")


def test_a_run_whose_checkpoints_are_all_damaged(run):
    (run / "checkpoints" / "0000000007" / "facts.json").write_text("{}")
    assert "facts.json has 2 bytes" in refused(run, "has no whole checkpoint")


def test_a_checkpoint_that_was_moved_out_of_its_run(run, tmp_path):
    alone = tmp_path / "elsewhere" / "checkpoints" / "0000000007"
    shutil.copytree(run / "checkpoints" / "0000000007", alone)
    refused(alone, r"is a checkpoint, but the config of its run, .*run.yaml, cannot be read")


def test_a_run_of_another_task(run):
    asked = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump({**asked, "task": "prior"}))
    refused(run, r"is the config of task 'prior', and a tokenizer comes from a run with task 'tokenizer'")


def test_saving_into_a_run_or_on_a_full_disk(run, tmp_path):
    tokenizer = small()
    with pytest.raises(ValueError, match=r"holds a run or a checkpoint.*give another folder"):
        tokenizer.save(run)
    assert not (run / CARD).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RuntimeError, match=r"was not written to .*; make room there, or choose another folder"
    ) as caught:
        tokenizer.save(tmp_path / "file" / "out")
    assert "NotADirectoryError" in str(caught.value)


def _full(*_):
    raise OSError(28, "No space left on device")


def test_a_save_on_a_full_disk_leaves_the_tokenizer_that_was_there(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(manifest, "seal", _full)
    with pytest.raises(RuntimeError, match="No space left on device"):
        small().save(saved)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def _save_and_die(folder, seed, number):
    """Save, and be killed before the rename of this number."""
    replace, done = os.replace, []

    def counted(made, path):
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(replace(made, path))

    os.replace = counted
    small(seed=seed).save(folder)


def _all_die(cases):
    for folder, kills in cases.items():
        for number, before in enumerate(kills, 1):
            child = os.fork()
            if not child:
                _save_and_die(folder, number, before)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.slow
def test_a_kill_between_the_renames_of_a_save_leaves_a_tokenizer(tmp_path):
    """The renames are of the new card, to its place beside, of the weights, and of the card."""
    made = [small(seed=seed).fingerprint for seed in range(4)]
    standing = {"over 0": 0, "over 1": 0, "over 2": 1, "over 2 1": 1, "new 1": None, "new 2": 1, "new 2 1": 1}
    for name in standing:
        if name.startswith("over"):
            small(seed=0).save(tmp_path / name)
    process = forks.context.Process(
        target=_all_die, args=({tmp_path / name: [int(n) for n in name.split()[1:]] for name in standing},)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    for name, number in standing.items():
        if number is None:
            refused(tmp_path / name, "has weights and no card.json: writing it was not finished")
        else:
            assert Tokenizer.load(tmp_path / name).fingerprint == made[number], name
        small(seed=3).save(tmp_path / name)
        assert Tokenizer.load(tmp_path / name).fingerprint == made[3]
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [CARD, WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, CARD])
def test_a_save_that_cannot_rename_leaves_a_tokenizer(saved, monkeypatch, name):
    fingerprints = [Tokenizer.load(saved).fingerprint, small(seed=2).fingerprint]
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda made, path: _full() if Path(path).name == name else replace(made, path))
    with pytest.raises(RuntimeError, match="No space left on device"):
        small(seed=2).save(saved)
    monkeypatch.undo()
    assert Tokenizer.load(saved).fingerprint == fingerprints[name == CARD]
    small(seed=2).save(saved)
    assert sorted(path.name for path in saved.iterdir()) == [CARD, WEIGHTS]
