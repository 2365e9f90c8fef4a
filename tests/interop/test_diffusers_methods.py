"""What is not known, by models of diffusers: members, last-layer Laplace, tangents, probes, and the way to members."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from omegaconf import OmegaConf

from ldm import Branching, Sampling, load_ensemble, load_model
from ldm.commands.export import Export
from ldm.commands.exposure_measure import MeasureExposure
from ldm.commands.features_probe import FeaturesProbe
from ldm.commands.shared import ModelSource, Placement
from ldm.data.digits import Digits
from ldm.evaluation.taps import Reading, resolve_taps
from ldm.pipelines import PosteriorPipeline
from ldm.pipelines.features import make_backbone
from ldm.pipelines.fitting import LaplacePlan
from ldm.settings import FeatureReading
from ldm.util import generator
from tests.interop.models import UNET, latent_diffusion
from tests.training.runs import end_state, run_training

pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")

PIXELS = {**UNET, "in_channels": 1, "out_channels": 1}
OURS = {
    "UNet2DModel": ({"target": "UNetModel", "params": {**PIXELS, "num_classes": 11}}, "adm", 0),
    "UNet2DConditionModel": (
        {"target": "UNetModel", "params": {**PIXELS, "use_spatial_transformer": True, "context_dim": 16}},
        "crossattn",
        16,
    ),
    "DiTTransformer2DModel": (
        {
            "target": "DiT",
            "params": {
                "input_size": 8,
                "in_channels": 1,
                "hidden_size": 32,
                "depth": 2,
                "num_heads": 2,
                "num_classes": 10,
                "learn_sigma": False,
            },
        },
        "adm",
        0,
    ),
}
WHERE = {"UNetModel": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "DiT": "ldm.modules.dit.DiT"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a folder of diffusers of class-conditional pixels, its class table in the network or beside it."""
    from ldm.interop.export import export_folder

    root = tmp_path_factory.mktemp("methods")

    @cache
    def write(kind):
        unet, key, width = OURS[kind]
        embedder = {"n_classes": 11, "embed_dim": width, "key": "class_label"}
        model = latent_diffusion(
            {**unet, "target": WHERE[unet["target"]]},
            channels=1,
            conditioning_key=key,
            cond_stage_key="class_label",
            cond_stage_config={"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": embedder},
        )
        return export_folder(model, root / kind)

    return write


def load(folder):
    return load_model(diffusers=folder, sampling=Sampling(steps=3, scale=2.0))


@pytest.mark.parametrize("kind", OURS)
def test_members_of_a_class_table_disagree(kind, folders):
    """Mutual information of members that differ in rows of the table, wherever the network has it."""
    pipeline = load(folders(kind))
    tables = pipeline.model.class_tables.axes
    state = pipeline.model.state_dict()
    rows = {name: state[name] for name in tables}
    members = [
        {name: value + 0.5 * torch.randn(value.shape, generator=generator(member)) for name, value in rows.items()}
        for member in range(3)
    ]
    ensemble = load_ensemble(model=pipeline, members=members)
    info = ensemble.information(classes=[1, 3], n=2, branching=Branching(at=0.0))
    assert info.mi.shape == (2, 2)
    assert bool((info.mi > 1e-4).all())


def test_posterior_of_the_last_layer_propagates(folders):
    """Persistent weights and their first-order limit agree on where the variance is, if the weights spread little."""
    pipeline = load(folders("UNet2DModel"))
    laplace = LaplacePlan(curvature="full", draws=1).fit(pipeline, Digits("test"), range(16))
    laplace.optimize_sigma_noise()
    laplace.prior_precision = 1e4
    maps = {}
    for method in ("persistent", "tangents"):
        posterior = PosteriorPipeline(pipeline, laplace, draws=4)
        *_, last = posterior.steps(method, [1, 3], [0, 1])
        maps[method] = last.var
    assert all(bool((value > 0).all()) and value.shape == (2, 1, 8, 8) for value in maps.values())
    pair = torch.stack([value.flatten().log() for value in maps.values()])
    assert torch.corrcoef(pair)[0, 1] > 0.8


@pytest.mark.parametrize("kind", OURS)
def test_features_of_every_block_are_read(kind, folders):
    pipeline = load(folders(kind))
    backbone = make_backbone(pipeline.model)
    taps = resolve_taps(backbone.network, ["all"])
    reading = Reading(times=(11.0,), taps=taps)
    states = torch.zeros(2, 1, 8, 8)
    found = backbone.features(states, [0, 1], reading)
    assert len(found) == len(taps) >= 2
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_probes_and_exposure_read_the_data_of_a_config_on_top(folders, tmp_path):
    """What docs/diffusers.md says of a folder, which has no data: refused as it is, and the config that names them."""
    folder = str(folders("UNet2DModel"))
    place, few = Placement("cpu"), {"t": (11,), "layers": ("all",)}
    for command in (
        FeaturesProbe(ModelSource(folder), str(tmp_path / "none"), reading=FeatureReading(**few), place=place),
        MeasureExposure(ModelSource(folder), str(tmp_path / "none"), place=place),
    ):
        with pytest.raises(ValueError, match=r"`decu export --run FOLDER --out base.ckpt` writes base.yaml; write one"):
            command.run()
    base = Export(folder, str(tmp_path / "base.ckpt")).run()
    digits = "{target: ldm.data.digits.Digits, params: {split: %s}}"
    params = f"{{batch_size: 16, train: {digits % 'train'}, validation: {digits % 'test'}}}"
    config = tmp_path / "theirs.yaml"
    config.write_text(f"bases: base.yaml\ndata: {{target: main.DataModuleFromConfig, params: {params}}}\n")
    source = ModelSource(base=str(config), ckpt=str(base))
    plan = {"epochs": 1, "seeds": 1, "n_train": 64, "place": place, "reading": FeatureReading(**few)}
    found = FeaturesProbe(source, str(tmp_path / "probe"), **plan).run()
    assert 0.05 < found["trained"].mean < 1
    sampling = Sampling(steps=3)
    MeasureExposure(source, str(tmp_path / "exposure"), n=16, sampling=sampling, place=place).run()
    rows = (tmp_path / "exposure" / "states.csv").read_text().splitlines()
    assert len(rows) > 3


LORA = {"names": ["lora"], "lora": {"layers": ["attention"], "rank": 2}}


@pytest.mark.parametrize("heads", [None, LORA])
def test_members_train_on_an_exported_base(heads, folders, tmp_path):
    """`decu export` of the folder gives the config and the weights that main.py trains members on."""
    folder = folders("UNet2DConditionModel")
    pipeline = load(folder)
    out = Export(str(folder), str(tmp_path / "base.ckpt")).run()
    config = OmegaConf.load(tmp_path / "base.yaml")
    same = load_model(base=tmp_path / "base.yaml", ckpt=out, sampling=pipeline.sampling)
    labels = ([1, 3], [0, 1])
    assert torch.equal(same.sample_latents(*labels), pipeline.sample_latents(*labels))
    again = Export(str(out), str(tmp_path / "again"), to="diffusers", base=str(tmp_path / "base.yaml")).run()
    assert torch.equal(load(again).sample_latents(*labels), pipeline.sample_latents(*labels))
    digits = {"target": "ldm.data.digits.Digits", "params": {"split": "test"}}
    config.data = {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 4, "num_workers": 0, "train": digits},
    }
    assert config.model.params.pretrained_path == str(out)
    config.model.base_learning_rate = 1e-2
    if heads is not None:
        config.model.params.heads = heads
    config.lightning = {
        "trainer": {"max_steps": 1, "enable_progress_bar": False},
        "callbacks": {"image_logger": {"params": {"disabled": True}}},
    }
    OmegaConf.save(config, tmp_path / "member.yaml")
    run = run_training(
        tmp_path / "member.yaml", tmp_path, start_from_pretrained=True, component=0, ensemble_name="a", scale_lr=False
    )
    trained = end_state(run)
    base = pipeline.model.state_dict()
    if heads is None:
        assert trained.keys() == set(pipeline.model.class_tables.axes)
        assert all(not torch.equal(value, base[name]) for name, value in trained.items())
    else:
        assert trained and all(name.endswith(("lora_A", "lora_B")) for name in trained)
    members = [trained, {name: torch.zeros_like(value) if heads else base[name] for name, value in trained.items()}]
    info = load_ensemble(model=same, members=members).information(classes=[1], n=2, branching=Branching(at=0.0))
    assert float(info.mi.min()) > 0
