"""Modules that were pickled whole with the text of their class: weights come back, and nothing of them is run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoint import load_checkpoint, load_state_dict
from tests.persistence import Persistent, write_published


class Touch:
    """Unpickling this creates a file: the mark of executed code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def publish(tmp_path):
    """A function that writes what it is given as NVIDIA's pickles are written."""
    return lambda content: write_published(content, tmp_path / "net.pkl")


def small_network():
    net = nn.Module()
    net.model = nn.Module()
    net.model.enc = nn.ModuleDict({"4x4_conv": nn.Conv2d(1, 2, 3)})
    net.model.norm = nn.BatchNorm1d(3)
    net.model.register_buffer("table", torch.ones(2), persistent=False)
    net.model.shared = net.model.norm
    return net


def test_weights_come_back_and_nothing_is_run(publish):
    net = small_network()
    path = publish({"ema": Persistent(net, "EDMPrecond"), "loss_fn": Persistent(nn.Module(), "EDMLoss")})
    content = load_checkpoint(path)
    assert content["class_name"] == "EDMPrecond"
    expected = net.state_dict()
    assert {name: value.dtype for name, value in content["state_dict"].items()} == {
        name: value.dtype for name, value in expected.items()
    }
    assert all(torch.equal(load_state_dict(path)[name], value) for name, value in expected.items())
    with pytest.raises(ModuleNotFoundError, match="torch_utils"):
        pickle.loads(path.read_bytes())


def test_code_beside_the_weights_is_not_run(publish, tmp_path):
    net, mark = small_network(), tmp_path / "ran"
    net.hook = Touch(mark)
    path = publish({"ema": Persistent(net, "EDMPrecond"), "augment_pipe": Touch(mark)})
    assert load_state_dict(path).keys() == net.state_dict().keys()
    assert not mark.exists()


def test_other_pickles_are_refused_with_what_to_do(publish, tmp_path):
    net = small_network()
    with pytest.raises(ValueError, match=r"entry 'ema'.*it holds G_ema, D\. Save the state dict"):
        load_checkpoint(publish({"G_ema": Persistent(net, "Generator"), "D": None}))
    with pytest.raises(ValueError, match="it holds list"):
        load_checkpoint(publish([1, 2]))
    with pytest.raises(ValueError, match="holds no weights"):
        load_checkpoint(publish({"ema": Touch(tmp_path)}))
    net.model.norm._parameters["weight"] = Touch(tmp_path / "ran")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is no tensor"):
        load_checkpoint(publish({"ema": Persistent(net, "EDMPrecond")}))
    whole = publish({"ema": Persistent(small_network(), "EDMPrecond")})
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(whole)
    whole.write_bytes(b"\x80\x04r\xff\xff\xff\x7f.")
    with pytest.raises(ValueError, match="memo"):
        load_checkpoint(whole)
    assert not (tmp_path / "ran").exists()
