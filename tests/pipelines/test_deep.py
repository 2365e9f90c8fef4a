"""Deep features that are kept between steps: against a loop by hand, and where they must not change anything."""

import pytest
import torch

from ldm.commands.shared import ModelSource, PosteriorSource
from ldm.commands.value import ValueData
from ldm.diffusion.denoiser import NetworkDenoiser, guided
from ldm.diffusion.samplers import ddim, run
from ldm.modules.diffusionmodules.util import repeat_rows
from ldm.modules.dit import DiT
from ldm.pipelines import load_ensemble
from ldm.pipelines.deep import ActiveChain, Chain, ReusingSampler
from ldm.pipelines.speed import speed_up
from ldm.settings import Branching, Guidance, Sampling, Speed
from tests.conftest import tiny_config, tiny_model
from tests.ensembles import write_ensemble

CPU = torch.device("cpu")
LABELS, IMAGES = [3, 7, 1], [0, 1, 2]


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return load_ensemble(str(write_ensemble(tmp_path_factory.mktemp("deep"))), Sampling(steps=6), device="cpu")


@pytest.fixture
def inputs():
    draws = torch.Generator().manual_seed(0)
    config = tiny_config()["params"]["unet_config"]
    levels = {**config["params"], "channel_mult": [1, 2], "attention_resolutions": [2]}
    unet = tiny_model(unet_config={**config, "params": levels}).model.diffusion_model
    x, context = torch.randn(2, 1, 8, 8, generator=draws), torch.randn(4, 1, 8, generator=draws)
    return unet, x, unet.condition(torch.tensor([10.0, 700.0])), context


@pytest.mark.parametrize("shallow", [0, 1, 2, 3, 4])
def test_a_unet_split_anywhere_is_itself(inputs, shallow):
    unet, *given = inputs
    with torch.no_grad():
        whole = unet.features(*given)
        features, deep = unet.split_features(*given, shallow)
        again, _ = unet.split_features(*given, shallow, deep)
        other, _ = unet.split_features(*given, shallow, torch.zeros_like(deep))
    assert torch.equal(features, whole) and torch.equal(again, whole)
    assert not torch.allclose(other, whole)


def reuse_by_hand(pipeline, every):
    """Latents of the base network, whose deep features are computed at evaluations 0, every, 2 every, .."""
    model, unet = pipeline.model, pipeline.model.model.diffusion_model
    kept = {"count": 0}

    def network(x, t, cond):
        emb, context = model.network.condition(t, cond)
        wide = repeat_rows(x, len(cond))
        deep = kept["deep"] if kept["count"] % every else None
        features, kept["deep"] = unet.split_features(wide, repeat_rows(emb, len(cond)), context, 1, deep)
        kept["count"] += 1
        return unet.readout(features)

    network.shares_x = True
    cond = torch.tensor(LABELS)
    denoiser = guided(
        NetworkDenoiser(network, model.schedule, model.target, cond), torch.full_like(cond, 10), pipeline.scale
    )
    noise = pipeline.noise(IMAGES)
    with torch.no_grad():
        return run(ddim(denoiser, model.schedule, pipeline.initial(noise), pipeline.times, noise=noise))


@pytest.mark.parametrize("every", [2, 4])
def test_latents_are_those_of_a_loop_by_hand(ensemble, every):
    expected = reuse_by_hand(ensemble, every)
    exact = ensemble.sample_latents(LABELS, IMAGES)
    for chunk in ("auto", 1, 4):
        found = ensemble.with_(deep_every=every, chunk=chunk).sample_latents(LABELS, IMAGES)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - exact).abs().max() > 1e-3, "what is kept is not what would be computed"


def test_deep_blocks_run_at_every_nth_evaluation(ensemble):
    """Two of the six steps, and of Heun's eleven evaluations four."""
    kept = ensemble.with_(deep_every=3)
    calls = []
    middle = kept.model.model.diffusion_model.middle_block
    hook = middle.register_forward_hook(lambda *_: calls.append(1))
    kept.sample_latents(LABELS, IMAGES)
    assert len(calls) == 2
    kept.with_(sampler="Heun").sample_latents(LABELS, IMAGES)
    hook.remove()
    assert len(calls) == 2 + 4


def test_each_chain_begins_anew(ensemble):
    kept = ensemble.with_(deep_every=2)
    first = kept.sample_latents(LABELS, IMAGES)
    kept.sample_latents([5, 5], [7, 8])
    assert torch.equal(kept.sample_latents(LABELS, IMAGES), first)


def test_an_interval_of_one_is_exact(ensemble):
    model = ensemble.model
    noise = ensemble.noise(IMAGES)
    where = (model.schedule, ensemble.initial(noise), ensemble.times)
    kept = ensemble.with_(deep_every=2)
    active = kept.model.model.diffusion_model.features.active
    with torch.no_grad():
        found = run(
            ReusingSampler(ensemble.sampler, active, 1)(kept.denoiser(torch.tensor(LABELS)), *where, noise=noise)
        )
    torch.testing.assert_close(found, ensemble.sample_latents(LABELS, IMAGES))
    back = kept.with_(deep_every=1)
    assert torch.equal(back.sample_latents(LABELS, IMAGES), ensemble.sample_latents(LABELS, IMAGES))


def test_the_branched_step_is_never_a_reused_one(ensemble):
    """At the first step nothing was kept: mutual information is exact. Later it is exact of other states."""
    first = ensemble.with_(branching=Branching(step=0))
    exact = first.information([2, 4], n=2)
    kept = first.with_(deep_every=3).information([2, 4], n=2)
    torch.testing.assert_close(torch.as_tensor(kept.mi), torch.as_tensor(exact.mi), rtol=1e-4, atol=1e-7)
    late = ensemble.with_(branching=Branching(step=5))
    found, other = late.with_(deep_every=3).information([2], n=2), late.information([2], n=2)
    assert not torch.allclose(torch.as_tensor(found.mi), torch.as_tensor(other.mi), rtol=1e-3, atol=0)


def test_guidance_that_begins_and_ends_finds_nothing_to_take(ensemble):
    """Passes of the condition alone must not take what passes of both conditions kept, whatever fits into a pass."""
    given = Guidance(interval=(0.3, 3.0))
    kept = ensemble.with_(deep_every=2, guidance=given)
    expected = kept.sample_latents(LABELS, IMAGES)
    for chunk in (1, 3):
        found = kept.with_(chunk=chunk).sample_latents(LABELS, IMAGES)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_passes_that_are_not_those_kept_do_not_match():
    chain, x = Chain(2), torch.zeros(1)

    def split(x, emb, context, shallow, deep=None):
        return x, x if deep is None else deep

    chain.begin((3,), True)
    for rows in (2, 1):
        chain.run(split, 1, x.expand(rows), x, None)
    assert chain.matched and not chain.needs_all((3,)) and chain.needs_all((4,))
    for calls in [(2,), (1, 2), (2, 1, 1)]:
        chain.begin((3,), False)
        for rows in calls:
            chain.run(split, 1, x.expand(rows), x, None)
        assert not chain.matched
    chain.begin((3,), False)
    for rows in (2, 1):
        chain.run(split, 1, x.expand(rows), x, None)
    assert chain.matched


def test_what_keeps_nothing_is_refused(ensemble):
    net = DiT(4, 2, 1, 16, 2, 2, num_classes=3)
    with pytest.raises(ValueError, match="class DiT has none that are kept"):
        speed_up(net, Speed(deep_every=2), CPU)
    with pytest.raises(ValueError, match="at most the 2 blocks"):
        ensemble.with_(deep_every=2, shallow_blocks=3)
    with pytest.raises(ValueError, match="give --deep_every"):
        Speed(shallow_blocks=2)
    with pytest.raises(ValueError, match="deep_every must be at least 1"):
        Speed(deep_every=0)
    with pytest.raises(ValueError, match="no sampler steps here"):
        ValueData(ModelSource(), PosteriorSource("posterior"), "out", speed=Speed(deep_every=2))
    kept = ensemble.with_(deep_every=2)
    with torch.enable_grad(), pytest.raises(ValueError, match="run all of the network at every evaluation"):
        next(kept.sampler(kept.denoiser(torch.tensor([1])), kept.model.schedule, torch.zeros(1, 1, 8, 8), kept.times))


def test_records_say_what_was_kept(ensemble):
    assert "deep_every" not in ensemble.describe()
    for given in ({"deep_every": 2, "shallow_blocks": 2}, {"shallow_blocks": 2, "deep_every": 2}):
        assert ensemble.with_(**given).describe()["shallow_blocks"] == 2
    assert ActiveChain().chain is None
