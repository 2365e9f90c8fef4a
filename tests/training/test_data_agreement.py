"""What a config says in two places is compared before the first step; what a resumed run may change, too."""

from typing import ClassVar

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from ldm.commands.line import parse
from ldm.commands.train import Train
from ldm.data.digits import Digits
from ldm.images import save_image
from ldm.ranges import OPTIONS, PARAMETERS
from ldm.settings import Training
from ldm.training.agreement import check_agreement
from ldm.training.config import packaged_configs, point_data
from ldm.training.resumed import check_resumed, describe_steps
from ldm.training.runs import RunDirectory
from ldm.training.session import prepare_data, prepare_model

NETWORK = {"image_size": 8, "in_channels": 1, "out_channels": 1, "model_channels": 32, "num_res_blocks": 0}
NETWORK |= {
    "attention_resolutions": [],
    "channel_mult": [1],
    "use_spatial_transformer": True,
    "context_dim": 16,
    "num_heads": 1,
}
ENCODER = {"ch": 32, "out_ch": 1, "in_channels": 1, "resolution": 8, "z_channels": 1, "ch_mult": [1, 1]}
STAGE = {"ddconfig": {**ENCODER, "num_res_blocks": 0, "attn_resolutions": [], "double_z": False}}
STAGE |= {"lossconfig": {"target": "torch.nn.Identity"}, "n_embed": 4, "embed_dim": 1}
DATA = {"target": "ldm.data.digits.Digits", "params": {"split": "train", "image_size": 8}}
MODEL = {
    "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": NETWORK},
    "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
    "cond_stage_config": {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"n_classes": 11, "embed_dim": 16},
    },
    "cond_stage_key": "class_label",
    "conditioning_key": "crossattn",
    "image_size": 8,
    "channels": 1,
    "use_ema": False,
}
CONFIG = {
    "model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": MODEL},
    "data": {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 4, "num_workers": 0, "train": DATA, "validation": DATA},
    },
}
STAGED = {
    "model.params.first_stage_config.target": "ldm.models.autoencoder.VQModelInterface",
    "model.params.first_stage_config.params": STAGE,
    "model.params.image_size": 4,
}


class Bytes(Digits):
    """Digits whose images are numbers from 0 to 255, as pictures are read from files."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "image": (item["image"] + 1) * 127.5}


# Changes that do not agree with the rest, and what the refusal names.
APART = [
    ({"data.params.train.target": f"{__name__}.Bytes"}, r"numbers in \[-1, 1\]; .*float32 from 0 to 239"),
    ({"data.params.train.params.image_size": 16}, "are 16 x 16, and the model's are 8 x 8"),
    ({"data.params.validation": {**DATA, "params": {"image_size": 16}}}, "data.params.validation are 16 x 16"),
    ({"data.params.train.params.channels": 3}, "have 3 channels, and the model's have 1"),
    ({"model.params.image_size": 16}, "model.params.image_size 16"),
    ({"model.params.channels": 3}, "channels is 3, and the network gives 1"),
    ({"model.params.unet_config.params.out_channels": 3}, "the network gives 3 channels .* expected 1"),
    ({"model.params.unet_config.params.in_channels": 2}, "the network takes 2"),
    ({"model.params.first_stage_key": "picture"}, "first_stage_key is 'picture', and an item .* has .*image"),
    ({"model.params.cond_stage_key": "label"}, "cond_stage_key is 'label'"),
    ({"model.params.conditioning_key": "concat"}, "joins a picture"),
    ({**STAGED, "model.params.image_size": 8}, "are 8 x 8, and the model's are 16 x 16 .* times 2 of the first stage"),
]


def changed(changes):
    config = OmegaConf.create(yaml.safe_load(yaml.dump(CONFIG)))
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False)
    return config


def compare(changes):
    training = Training(base=("x.yaml",))
    config = changed(changes)
    check_agreement(prepare_model(config, training), prepare_data(config, training))


@pytest.mark.parametrize("changes", [{}, STAGED], ids=["pixels", "latents"])
def test_what_agrees_passes(changes):
    compare(changes)


@pytest.mark.parametrize(("changes", "message"), APART, ids=lambda one: str(one)[:40])
def test_what_does_not_agree_is_refused(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        compare(changes)
    assert "\n" not in str(caught.value)


def test_classes_of_two_data_sets_are_compared_by_name():
    class Named(list):
        class_names: ClassVar = ("ant", "bee", "cat")

    class Fewer(Named):
        class_names: ClassVar = ("ant", "cat")

    class Module:
        datasets: ClassVar = {"train": Named(), "validation": Fewer()}

    with pytest.raises(ValueError, match="it lacks bee; give both sets the same class_names"):
        check_agreement(object(), Module())


def write_captions(folder, captions):
    for number, caption in enumerate(captions):
        picture = torch.full((8, 8, 1), 60 * number, dtype=torch.uint8).numpy()
        save_image(picture, folder / f"{number}.png", overwrite=False)
        (folder / f"{number}.txt").write_text(caption)
    return {
        "target": "ldm.data.captions.CaptionedFolder",
        "params": {"root": str(folder), "channels": 1, "image_size": 8},
    }


def test_captions_of_two_folders_need_not_be_the_same(tmp_path):
    """A model of texts reads the words of a caption: no number stands for it."""
    words = {"target": "ldm.modules.encoders.modules.WordTokenizer", "params": {"words": ["cat"], "max_length": 2}}
    text = {"n_embed": 16, "n_layer": 1, "vocab_size": 4, "max_seq_len": 2, "tokenizer": words}
    embedder = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": text}
    changes = {"model.params.cond_stage_config": embedder, "model.params.cond_stage_key": "caption"}
    for split, captions in (("train", ["a cat", "a dog"]), ("validation", ["a bird"])):
        changes[f"data.params.{split}"] = write_captions(tmp_path / split, captions)
    compare(changes)


SAVED = {"model": {"base_learning_rate": 1e-3, "params": {"weight_decay": 0.0}}, "data": {"params": {"batch_size": 8}}}


def resume(tmp_path, changes, images=8, rate=1e-3, kept=True):
    """Compare a run of 8 images a step with how it would go on."""
    steps = {"run": describe_steps(8, 1e-3)} if kept else {}
    saved = OmegaConf.create({**SAVED, **steps})
    now = OmegaConf.merge(saved, OmegaConf.from_dotlist(changes))
    check_resumed(RunDirectory(tmp_path), saved, now, describe_steps(images, rate))


def test_a_resumed_run_may_change_what_its_checkpoint_does_not_keep(tmp_path):
    resume(tmp_path, ["data.params.num_workers=3", "model.params.monitor=val/loss"])
    resume(tmp_path, ["data.params.batch_size=4"], images=8)  # on two devices


@pytest.mark.parametrize(
    ("change", "images", "rate", "message"),
    [
        ("model.params.weight_decay=0.1", 8, 1e-3, "weight_decay is 0.0 .* the optimiser's state"),
        ("model.params.ema.decay=0.5", 8, 1e-3, "model.params.ema is None"),
        ("model.params.timesteps=10", 8, 1e-3, "the noise levels"),
        ("model.base_learning_rate=1e-2", 8, 1e-2, "learning rate of the run is 0.001"),
        ("data.params.batch_size=16", 16, 1e-3, "took 8 images in a step, and would take 16"),
    ],
)
def test_a_resumed_run_keeps_what_its_checkpoint_keeps(change, images, rate, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, [change], images, rate)


def test_runs_of_the_first_version_are_compared_by_their_configs(tmp_path):
    resume(tmp_path, [], kept=False)
    with pytest.raises(ValueError, match="base_learning_rate"):
        resume(tmp_path, ["model.base_learning_rate=1e-2"], rate=1e-2, kept=False)


def test_an_option_that_the_run_contradicts_is_refused():
    kept = {"seed": 5, "component": 0, "members": None, "scale_lr": True}
    assert Training(resume="x").resuming(kept).seed == 5
    assert Training(resume="x", seed=5).resuming(kept).seed == 5
    with pytest.raises(ValueError, match="--seed 7: the run was started with 5"):
        Training(resume="x", seed=7).resuming(kept)
    with pytest.raises(ValueError, match="--first_stage sample: the run was started with mode"):
        Training(resume="x", first_stage="sample").resuming(kept)  # a run of the first version took the mean


@pytest.mark.parametrize("words", [["--seed", "23"], ["-s", "23"], ["--seed=23"], ["--component", "0"]])
def test_a_word_counts_as_said_where_it_says_the_default(words):
    training = parse(Train, ["--resume", "x", *words], "train").training
    with pytest.raises(ValueError, match=r"the run was started with [53]"):
        training.resuming({"seed": 5, "component": 3})
    assert parse(Train, ["--resume", "x"], "train").training.resuming({"seed": 5}).seed == 5


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--component", "0"], "--component 0 trains a member"),
        (["--ensemble_name", "b"], "--ensemble_name b names a member's run"),
    ],
)
def test_a_members_words_need_a_member(words, match, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Train, ["--base", "x.yaml", *words], "train")
    assert end.value.code == 2 and match in capsys.readouterr().err


def test_bins_that_no_data_set_takes_are_refused():
    config = OmegaConf.create({"data": {"params": {"train": {"params": {"synset_bins": False}}}}})
    assert point_data(config, None, synset_bins=True).data.params.train.params.synset_bins
    del config.data.params.train.params.synset_bins
    assert point_data(config, None) == config
    with pytest.raises(ValueError, match="--synset_bins acts on data sets whose params name synset_bins"):
        point_data(config, None, synset_bins=True)


def test_a_name_has_one_range():
    assert not set(PARAMETERS) & {"target", "params"}
    shared = PARAMETERS.keys() & OPTIONS.keys()
    assert {"batch_size", "epochs", "rank", "seed"} <= shared
    assert packaged_configs().is_dir()
