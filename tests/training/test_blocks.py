"""Blocks of a network in training: compiled and recomputed ones train as plain ones do, under the same names."""

import copy
import csv
import logging
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.func import functional_call, vmap

from ldm.checkpoint import save_checkpoint
from ldm.modules.dit import DiT
from ldm.training.blocks import BlockForward, BlockOptions, CompiledBlocks, find_blocks
from ldm.training.joint import JointMembers, start_members
from tests.conftest import tiny_model
from tests.training.conftest import write_config
from tests.training.runs import assert_same_end, end_state, losses, resume, run_training

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Wave(nn.Module):
    """A block that compiles within seconds."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return (self.factor * x).sin()


def transformer_config(folder):
    """The tiny config with a DiT of three blocks of one kind."""
    path = write_config(folder)
    content = OmegaConf.load(path)
    own = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 3, "num_heads": 2}
    own |= {"num_classes": 10, "learn_sigma": False}
    content.model.params.unet_config = {"target": "ldm.modules.dit.DiT", "params": own}
    content.model.params |= {"conditioning_key": "adm", "cond_stage_trainable": False}
    content.model.params.cond_stage_config.params.embed_dim = 0
    OmegaConf.save(content, path)
    return path


def test_blocks_are_those_that_the_network_names():
    model = tiny_model()
    unet = model.model.diffusion_model
    assert [id(one) for one in find_blocks(model)] == [id(unet.get_submodule(name)) for name in unet.taps.values()]


def test_a_network_of_ones_own_is_one_block():
    model = tiny_model()
    model.model.diffusion_model = own = nn.Linear(3, 3)
    assert find_blocks(model) == [own]


def test_what_names_no_blocks_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        BlockOptions(compile=True).apply(nn.Linear(2, 2))
    assert "--compile: Linear names no blocks; it runs as it is" in caplog.text


def test_recomputed_blocks_train_as_plain_ones_do(config, tmp_path):
    """Bit for bit, dropout of 0.1 among it, also after a stop; under the same names of weights and averages."""
    plain = run_training(config, tmp_path / "plain")
    half = run_training(config, tmp_path / "again", gradient_checkpointing=True, max_steps=4)
    resume(half, max_steps=8)
    assert_same_end(plain, half)
    assert list(losses(half).values()) == list(losses(plain).values())
    for file in (half / "configs").glob("*lightning.yaml"):
        assert OmegaConf.load(file).gradient_checkpointing is True, "a resumed run goes on with it"


def test_blocks_run_again_in_the_backward_pass_alone():
    block = Wave()
    block.forward = BlockForward(block, None, recomputed=True)
    loss = block(draws(2, 3).requires_grad_()).sum()
    assert block.runs == 1
    loss.backward()
    assert block.runs == 2
    with torch.no_grad():
        block.eval()(draws(2, 3))
    assert block.runs == 3


def test_a_recomputation_takes_the_weights_of_its_forward_pass():
    """Those of `functional_call` too, though the backward pass comes after it; and of a copy its own."""
    block = Wave()
    x, own = draws(2, 3), draws(3, seed=1).requires_grad_()
    expected = torch.autograd.grad((own * x).sin().sum(), own)[0]
    block.forward = BlockForward(block, None, recomputed=True)
    found = functional_call(block, {"factor": own}, (x,)).sum()
    torch.testing.assert_close(torch.autograd.grad(found, own)[0], expected)
    copied = copy.deepcopy(block)
    copied.factor.data = own.detach()
    torch.testing.assert_close(copied(x), (own * x).sin())


def test_members_together_run_recomputed_blocks(tmp_path):
    """One pass for two members, whose heads are stacked: losses and gradients of the plain blocks."""
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "base.ckpt")
    batch = {"image": draws(4, 8, 8, 1), "class_label": torch.tensor([1, 2, 3, 4])}
    found = []
    for options in (BlockOptions(), BlockOptions(gradient_checkpointing=True)):
        base = tiny_model(pretrained_path=str(tmp_path / "base.ckpt"), heads={"names": ["time_embedding"]})
        joint = JointMembers(start_members(base, 2, 0)).train()
        options.apply(joint)
        loss = sum(one for one, _ in joint.losses(batch, [member.draws for member in joint.members], 0, range(2)))
        found.append([loss, *torch.autograd.grad(loss, list(joint.parameters()))])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_transforms_run_the_plain_code():
    block = Wave()
    x = draws(4, 2, 3)
    block.forward = BlockForward(block, CompiledBlocks(), recomputed=True)
    torch.testing.assert_close(vmap(block)(x), x.sin())


@inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
def test_without_a_compiler_blocks_run_as_they_are(caplog):
    torch._dynamo.reset()
    compiled = CompiledBlocks()
    blocks = [Wave(), Wave()]
    for block in blocks:
        block.forward = BlockForward(block, compiled, recomputed=False)
    x = draws(2, 3)
    with caplog.at_level(logging.WARNING):
        found = blocks[1](blocks[0](x))
    torch.testing.assert_close(found, x.sin().sin())
    assert caplog.text.count("runs as it is") == 1 and not compiled.works


@compiler
@pytest.mark.slow
def test_compiled_blocks_train_as_plain_ones_do(tmp_path):
    """Three blocks of one kind are compiled once; losses are equal to rounding, names of tensors too."""
    config = transformer_config(tmp_path)
    plain = run_training(config, tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    fast = run_training(config, tmp_path / "fast", compile=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert losses(fast)[1] == pytest.approx(losses(plain)[1], rel=1e-5)
    # Adam divides by the roots of small squares, by which rounding grows from step to step.
    assert list(losses(fast).values()) == pytest.approx(list(losses(plain).values()), rel=1e-3)
    assert list(losses(fast)) == list(losses(plain)) == list(range(8))
    assert end_state(fast).keys() == end_state(plain).keys()
    half = run_training(config, tmp_path / "half", compile=True, gradient_checkpointing=True, max_steps=4)
    resume(half, max_steps=8)
    assert_same_end(half, fast)


@compiler
@pytest.mark.slow
def test_compiled_blocks_train_in_bfloat16(tmp_path):
    """Validation losses stay within bfloat16's rounding of those in float32."""
    config = transformer_config(tmp_path)
    runs = [run_training(config, tmp_path / "plain")]
    runs.append(run_training(config, tmp_path / "fast", compile=True, precision="bf16-mixed"))
    found = []
    for run in runs:
        with open(run / "csv" / "metrics.csv") as rows:
            found.append([float(row["val/loss_ema"]) for row in csv.DictReader(rows) if row.get("val/loss_ema")])
    assert found[0] and found[1] == pytest.approx(found[0], rel=0.02) and found[0] != found[1]


@compiler
@pytest.mark.slow
def test_a_compiled_network_is_that_of_plain_code():
    """Outputs and gradients of a DiT with dropout left out, blocks of one kind compiled once for two batch sizes."""
    network = DiT(8, 4, 1, 16, 2, 2, num_classes=10, learn_sigma=False)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * draws(*parameter.shape)
    holder = nn.Sequential(network)
    given = [(draws(size, 1, 8, 8), torch.full((size,), 5.0), torch.zeros(size, dtype=torch.long)) for size in (2, 3)]
    wanted = [p for p in network.parameters() if p.requires_grad]
    plain = [torch.autograd.grad(network(*one).square().sum(), wanted) for one in given]
    BlockOptions(compile=True).apply(holder)
    torch._dynamo.reset()
    counters.clear()
    fast = [torch.autograd.grad(network(*one).square().sum(), wanted) for one in given]
    assert counters["stats"]["unique_graphs"] == 2, "one code for each number of images"
    for first, second in zip(plain, fast, strict=True):
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
