"""`decu data prepare` without words, and latent-diffusion's released zips, against a local server."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.commands.data_prepare import PrepareData
from ldm.data.prepare import sources
from ldm.pipelines.loading import load_model
from ldm.training import released
from ldm.training.config import packaged_configs
from ldm.util import instantiate_from_config
from tests.cli import call
from tests.conftest import tiny_config
from tests.data.archives import packed


def test_every_zip_has_a_config_and_an_address():
    assert len(sources.ZOO) == 19
    assert all((packaged_configs() / f"{config}.yaml").is_file() for config in sources.ZOO.values())
    found = {
        source.folder: source.url or f"{source.address}/{source.name}" for source in sources.SOURCES["latent-diffusion"]
    }
    assert found["lsun_bedrooms"] == "https://ommer-lab.com/files/latent-diffusion/lsun_bedrooms.zip"
    assert found["vq-f16"].startswith("https://heibox.uni-heidelberg.de/f/")
    for name, config in sources.ZOO.items():
        section = released.read_model(config)
        assert section["target"].startswith("ldm.models."), name


def test_no_words_fetch_what_decu_needs(tmp_path, monkeypatch):
    """Into the folders that cin256-v2.yaml and DECU's command line read."""
    command = PrepareData()
    assert command.names == ["pretrained", "imagenet"]
    config = OmegaConf.load(packaged_configs() / "_bases" / "imagenet.yaml")
    assert command._folder("imagenet").name == config.paths.data_root.removeprefix("./") == "imagenet_data"
    assert str(command._folder("pretrained")) == "pretrained_models"
    assert str(PrepareData(root="mine")._folder("imagenet")) == "mine/imagenet"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(released, "prepare_networks", lambda folder, url, report: [folder / "cin256-v2" / "model.ckpt"])

    def offline(folder, url, report):
        raise ConnectionError("no answer")

    with pytest.raises(ValueError, match=r"only after a login(.|\n)*into imagenet_data"):
        call("data prepare", [])
    monkeypatch.setattr(released, "prepare_networks", offline)
    with pytest.raises(ValueError, match=r"pretrained: no answer(.|\n)*imagenet: ImageNet may be fetched only after"):
        call("data prepare", [])


FIRST_STAGE = {
    "target": "ldm.models.autoencoder.VQModel",
    "params": {
        "embed_dim": 3,
        "n_embed": 8,
        "ddconfig": {
            "double_z": False,
            "z_channels": 3,
            "resolution": 8,
            "in_channels": 1,
            "out_ch": 1,
            "ch": 32,
            "ch_mult": [1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}


@pytest.fixture
def zoo(server, tmp_path, monkeypatch):
    """Two small models in place of released ones, as configs and as zips of a server; {name: state dict}."""
    models = {"celeba": tiny_config(use_ema=True), "vq-f8": FIRST_STAGE}
    extra = {"celeba": {}, "vq-f8": {"loss.discriminator.main.0.weight": torch.zeros(1)}}
    states = {}
    for name, model in models.items():
        path = tmp_path / "configs" / f"{sources.ZOO[name]}.yaml"
        path.parent.mkdir(parents=True)
        OmegaConf.save(OmegaConf.create({"model": model, "paths": {"first_stage": "nowhere"}}), path)
        states[name] = instantiate_from_config(model).state_dict()
        content = {"state_dict": {**states[name], **extra[name]}, "global_step": 3}
        save_checkpoint(content, tmp_path / f"{name}.ckpt")
        archive = packed(tmp_path / f"{name}.zip", {"model.ckpt": (tmp_path / f"{name}.ckpt").read_bytes()})
        server.files[f"/{name}.zip"] = archive.read_bytes()
    monkeypatch.setattr(released, "packaged_configs", lambda: tmp_path / "configs")
    return states


def test_released_zips_are_checked_and_sampled(zoo, server, tmp_path, capsys):
    root = tmp_path / "nets"
    command = PrepareData("latent-diffusion", only="celeba,vq-f8", url=server.url, models_root=str(root))
    command.run()
    told = capsys.readouterr().out
    averages = sum(name.startswith("model_ema.") for name in zoo["celeba"])
    assert averages and f"all {len(zoo['celeba']) - averages} keys and shapes as released" in told
    assert f"all {len(zoo['vq-f8'])} keys and shapes as released" in told
    assert sorted(path.name for path in (root / "vq-f8").iterdir()) == ["model.ckpt", "vq-f8.zip"]
    config = root / "celeba" / "config.yaml"  # where latent-diffusion's scripts look for it
    assert OmegaConf.load(config).model.target == "ldm.models.diffusion.ddpm.LatentDiffusion"
    pipeline = load_model(base=str(config), ckpt=str(root / "celeba" / "model.ckpt"))
    table = pipeline.model.state_dict()["cond_stage_model.embedding.weight"]
    assert torch.equal(table, zoo["celeba"]["cond_stage_model.embedding.weight"])
    config.write_text("mine")
    asked = len(server.requests)
    command.run()
    assert len(server.requests) == asked and config.read_text() == "mine"
    for wrong in (
        PrepareData("latent-diffusion", only="imagenet-64"),
        PrepareData("latent-diffusion,adm", only="celeba"),
        PrepareData("pretrained", only="celeba"),
    ):
        with pytest.raises(ValueError, match=r"--only goes with --dataset adm or latent-diffusion alone"):
            wrong.run()


def test_what_is_not_the_released_network_is_refused(zoo, server, tmp_path):
    fewer = {name: value for name, value in zoo["vq-f8"].items() if "conv_out" not in name}
    save_checkpoint({"state_dict": fewer}, tmp_path / "other.ckpt")
    archive = packed(tmp_path / "other.zip", {"model.ckpt": (tmp_path / "other.ckpt").read_bytes()})
    server.files["/vq-f8.zip"] = archive.read_bytes()
    command = PrepareData("latent-diffusion", only="vq-f8", url=server.url, models_root=str(tmp_path / "nets"))
    with pytest.raises(ValueError, match=r"4 missing \(decoder\.conv_out\.bias"):
        command.run()


def test_a_zip_is_checked_before_the_next_is_fetched(zoo, server, tmp_path):
    server.files["/celeba.zip"] = b"a page that says to sign in"
    command = PrepareData("latent-diffusion", only="celeba,vq-f8", url=server.url, models_root=str(tmp_path / "nets"))
    with pytest.raises(ValueError, match=r"celeba\.zip is damaged or no archive \(file could not be opened .*\); move"):
        command.run()
    assert not any("vq-f8" in str(request) for request in server.requests)
