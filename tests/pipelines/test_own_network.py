"""A module that knows nothing of this package: samples, members, information, posteriors and features."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm import Branching, Sampling, load_ensemble, load_model
from ldm.checkpoint import save_tensors
from ldm.diffusion.schedule import FlowSchedule
from ldm.evaluation.taps import resolve_taps
from ldm.pipelines.features import make_backbone
from ldm.util import generator

PAGE = Path(__file__).parents[2] / "docs" / "own_network.md"
GIVEN = {"schedule": "ddpm", "shape": (1, 8, 8), "condition": "class", "n_classes": 4, "device": "cpu"}


class Own(nn.Module):
    """Layers in another order than they run in; its table is called `rows`."""

    def __init__(self, seed=0, channels=1):
        super().__init__()
        self.last = nn.Conv2d(8, channels, 3, padding=1)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.rows = nn.Embedding(5, 8)
        self.time = nn.Linear(1, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator("own", seed)))

    def forward(self, x, t, y=None):
        embedding = self.time(t[:, None] / 1000)
        embedding = embedding if y is None else embedding + self.rows(y)
        return self.last(torch.tanh(self.first(x) + embedding[:, :, None, None]))


def draw(*shape):
    return torch.randn(*shape, generator=generator("own inputs"))


def test_the_page_runs_as_it_stands():
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
    values = {}
    exec(compile(code, PAGE.name, "exec"), values)
    assert values["pictures"].shape == (4, 1, 8, 8)
    assert values["info"].mi.shape == (2, 4) and bool((values["info"].mi > 0).all())
    assert values["maps"].maps["image"].shape == (1, 1, 8, 8)
    assert bool((values["last"].var > 0).all()) and values["last"].var.shape == (2, 1, 8, 8)


def test_samples_are_those_of_the_formula():
    """DDIM of Song et al. 2021a, eq. 12, with guidance, written out for the bare module."""
    network = Own()
    model = load_model(network=network, null_class=4, sampling=Sampling(steps=4, scale=3.0), **GIVEN)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cat([torch.ones(1).double(), torch.cumprod(1 - betas, 0)])
    times = model.times.long()
    x = initial = draw(2, 1, 8, 8)
    for now, after in itertools.pairwise(times):
        t = torch.full((2,), float(now) - 1)
        with torch.no_grad():
            null, eps = network(x, t, torch.full((2,), 4)), network(x, t, torch.tensor([1, 3]))
        eps = null + 3 * (eps - null)
        clean = (x - (1 - abar[now]).sqrt() * eps) / abar[now].sqrt()
        x = (abar[after].sqrt() * clean + (1 - abar[after]).sqrt() * eps).float()
    torch.testing.assert_close(model.sample_latents([1, 3], [0, 1], initial), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("null", [0, 2, 7])
def test_the_null_class_may_be_any_label_of_the_network(null):
    """The same network with its rows in another order: samples, and the row that members share, are the same."""
    moved = Own()
    order = [*range(null), 4, *range(null, 4)] if null < 5 else [0, 1, 2, 3, 0, 0, 0, 4]
    moved.rows = nn.Embedding.from_pretrained(Own().rows.weight.detach()[order], freeze=False)
    sampling = Sampling(steps=3, scale=3.0)
    given = {"sampling": sampling, **GIVEN}
    expected = load_model(network=Own(), null_class=4, **given).sample_latents([1, 3], [0, 1])
    model = load_model(network=moved, null_class=null, **given)
    torch.testing.assert_close(model.sample_latents([1, 3], [0, 1]), expected)
    (table,) = model.model.class_tables.axes
    held = {table: model.model.get_parameter(table)}
    assert model.model.class_tables.null_rows(held) == {table: (0, (null,))}


def test_parts_are_found():
    model = load_model(
        network=Own(), taps={"mid": "first"}, heads={"time_embedding": ["time.*"]}, **GIVEN | {"n_classes": 5}
    )
    parts = model.model.parts
    below = "model.diffusion_model.network."
    assert parts.last_layer == f"{below}last", "the layer that runs last, not the one that was made last"
    assert parts.class_tables == {f"{below}rows.weight": 0}
    assert model.model.head_patterns == {
        "class_embedding": (f"{below}rows.*",),
        "output": (f"{below}last.*",),
        "time_embedding": (f"{below}time.*",),
    }
    assert resolve_taps(make_backbone(model.model, 0).network, ["mid"]) == {"mid": f"{below}first"}


def test_members_come_as_dictionaries_or_files(tmp_path):
    """Whole state dicts, or what differs; in files too. Members are the networks themselves."""
    network, others = Own(), [Own(seed) for seed in (1, 2)]
    model = load_model(network=network, null_class=4, sampling=Sampling(steps=3), **GIVEN)
    save_tensors(others[1].state_dict(), tmp_path / "one.safetensors")
    ensemble = load_ensemble(model=model, members=[others[0].state_dict(), tmp_path / "one.safetensors"])
    x, t, labels = draw(3, 1, 8, 8), torch.tensor([1.0, 40.0, 999.0]), torch.tensor([0, 4, 2])
    with torch.no_grad():
        expected = torch.stack([other(x, t, labels) for other in others])
        torch.testing.assert_close(ensemble.network(x, t, labels), expected)
    info = ensemble.information([0], n=2, branching=Branching(at=0.0))
    assert float(info.mean[0]) > 0
    with pytest.raises(ValueError, match="no tensor of the 1 members differs"):
        load_ensemble(model=model, members=[network.state_dict()])
    with pytest.raises(ValueError, match=r"holds 'head.weight' \[2\], the model none of this name"):
        load_ensemble(model=model, members=[{"head.weight": torch.zeros(2)}])


def test_times_and_calls_are_the_users():
    """A flow network that counts from noise, takes whole times, and returns what has a `sample`."""

    class Returned:
        def __init__(self, sample):
            self.sample = sample

    seen = []

    def call(network, x, t, cond):
        seen.append(t)
        return Returned(network(x, t.float()))

    network = Own()
    given = {"schedule": FlowSchedule(reversed_time=True), "target": "velocity", "shape": (1, 8, 8), "device": "cpu"}
    model = load_model(
        network=network,
        time=lambda t: (1000 * t).long(),
        adapter=call,
        sampling=Sampling(steps=2, sampler="Euler"),
        **given,
    )
    seen.clear()
    x = model.sample_latents(None, [0], start := draw(1, 1, 8, 8))
    assert [int(t[0]) for t in seen] == [0, 500]
    with torch.no_grad():
        half = start - 0.5 * network(start, torch.zeros(1))
        torch.testing.assert_close(x, half - 0.5 * network(half, torch.full((1,), 500.0)))


def test_what_does_not_fit_is_said_at_once():
    with pytest.raises(ValueError, match=r"gives \[1, 3, 8, 8\] for a state"):
        load_model(network=Own(channels=3), **GIVEN)
    with pytest.raises(ValueError, match="'class' and n_classes go together"):
        load_model(network=Own(), **GIVEN | {"condition": None})
    with pytest.raises(ValueError, match="null_class is a label"):
        load_model(network=Own(), null_class="last", **GIVEN)
    with pytest.raises(ValueError, match="schedule must be one of"):
        load_model(network=Own(), **GIVEN | {"schedule": "linear"})
    with pytest.raises(TypeError, match=r"\['target'\] with a network only"):
        load_model(run="logs", target="eps")
    learned = load_model(network=Own(channels=2), **GIVEN)
    assert learned.model.learned_variance is not None
