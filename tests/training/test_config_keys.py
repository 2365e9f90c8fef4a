"""No key of a config is ignored: a misspelt one is named with the nearest, and values have their types and ranges."""

import pytest
import yaml
from omegaconf import OmegaConf

from ldm.arguments import check_arguments, find_arguments
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.ranges import OPTIONS, check_range
from ldm.training.config import packaged_configs, read_config
from ldm.training.config_keys import check_config, load_checked_config
from ldm.training.data_words import read_data_config
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.models.test_compvis_configs import MODELS

UNET = "model.params.unet_config.params"
RULE = "model.params.scheduler_config.params"
# Words over a config of digits that are refused, and what the refusal says.
REFUSED = {
    "data.parms.batch_size=8": "data has an unknown key 'parms': did you mean 'params'",
    "data.batch_size=8": "data has an unknown key 'batch_size'",
    "dta.params.batch_size=8": "unknown section 'dta': did you mean 'data'",
    "data.params.train.parms.split=test": "did you mean 'params'",
    "data.params.train.params.splt=test": "takes no 'splt'; did you mean 'split'",
    "data.params.trian.params.split=test": "takes no 'trian'; did you mean 'train'",
    "model.base_learning_rat=1e-3": "did you mean 'base_learning_rate'",
    "model.params.timestep=100": "takes no 'timestep'; did you mean 'timesteps'",
    "model.params.unet_config.prams.num_heads=2": "unet_config has an unknown key 'prams': did you mean 'params'",
    "model.params.cond_stage_config.parms.ucg_rate=0.2": "did you mean 'params'",
    "model.params.scheduler_config.parms.f_max=[2.0]": "did you mean 'params'",
    "lightning.trainr.max_epochs=3": "did you mean 'trainer'",
    "lightning.max_epochs=1": "lightning has an unknown key 'max_epochs'",
    "lightning.callbacks.image_loger.params.max_images=2": "did you mean 'image_logger'",
    "lightning.callbacks.image_logger.parms.max_images=2": "did you mean 'params'",
    "lightning.callbacks.mine.targt=foo.Bar": "did you mean 'target'",
    "lightning.modelcheckpoint.every_n_epochs=1": "known are params, target",
    "lightning.modelcheckpoint.params.every_n_epochs=abc": "params.every_n_epochs must be a whole number or null",
    "lightning.modelcheckpoint.params.every_n_train_steps=-1": "params.every_n_steps must be at least 0",
    "lightning.modelcheckpoint.params.save_top_k=1.5": "save_top_k must be a whole number",
    "lightning.logger.target=foo.bar": "unknown key 'logger'",
    "model.params.monitor=???": "full_key: model.params.monitor",
    "lightning.trainer=null": "must be a mapping",
    "model.params.TIMESTEPS=100": "takes no 'TIMESTEPS'; did you mean 'timesteps'",
    "lightning=null": "must be a mapping",
    "uncertainty.branchat=0.5": "did you mean 'branch_at'",
    "uncertainty.branch_at=1.5": "at least 0 and at most 1",
    "uncertainty.n=abc": "uncertainty.n must be a whole number, got the word 'abc'",
    "probe.at.tt=[3]": "did you mean 't'",
    "classifier.epoch=3": "did you mean 'epochs'",
    "churn.S_mx=3": "did you mean",
    "foo.bar=1": "unknown section 'foo'",
    "paths.data_rot=x": "paths.data_rot is not referred to",
    "model.params.heads.nois=1": "did you mean 'noise'",
    "model.params.heads.init=bogus": "must be one of pretrained, perturbed",
    "model.params.heads.noise=-1": "must be at least 0",
    "model.params.timesteps=1000000000000000000000000": "must fit into 64 bits",
    "model.params.heads.names=[]": "nothing would train",
    "data.params.batch_size=1.5": "must be a whole number, got 1.5",
    "data.params.batch_size=null": "must be a whole number, got null",
    "data.params.train.params.image_size=abc": "must be a whole number",
    "data.params.train.target=5": "must be a word",
    "model.params.timesteps=0": "must be at least 1",
    "model.params.linear_start=nan": "must be a number, got the word 'nan'",
    "model.params.linear_start=.nan": "must be above 0 and below 1, got nan",
    "model.params.scale_factor=.inf": "must be above 0, got inf",
    "model.params.channels=0": "must be at least 1",
    "model.params.use_ema=maybe": "must be true or false",
    f"{UNET}.num_heads=-2": "must be at least 1",
    f"{UNET}.channel_mult=2": "must be a list",
    f"{UNET}.channel_mult=[0]": "must be above 0",
    f"{UNET}.channel_mult=[]": "at least one number",
    f"{RULE}.warm_up_steps=100": "must be a list",
    f"{RULE}.f_max=[abc]": "must be a list, each a number",
    "model.params.first_stage_config.ckpt_path=x": "unknown key 'ckpt_path'",
    "model.params.ema.deca=0.9": "LitEma takes no 'deca'; did you mean 'decay'",
    "model.params.ema.model=3": "LitEma takes no 'model'",
    "model.params.ema.decay=2": "ema.decay must be",
    "model.params.learned_variance.wieght=1": "did you mean 'weight'",
}
DIGITS = "configs/latent-diffusion/digits.yaml"


@pytest.mark.parametrize("word", REFUSED)
def test_a_key_or_value_that_nothing_takes_is_refused(word):
    with pytest.raises(ValueError) as caught:
        load_checked_config([DIGITS], [word])
    key, _, _ = word.partition("=")
    message = str(caught.value)
    assert REFUSED[word] in message and "\n" not in message
    assert key.split(".")[0] in message or key.split(".")[-1] in message


def test_keywords_of_a_first_stage_are_refused_before_a_network_is_built():
    """Which takes minutes where the network is a large one: nothing is built here."""
    for key, said in {
        "ddconfig.chh=64": r"first_stage_config\.params\.ddconfig\.chh: Encoder takes no 'chh'; did you mean 'ch'",
        "ddconfig.ch=0": r"ddconfig\.ch must be at least 1, got 0",
        "ddconfig.ch_mult=abc": r"ddconfig\.ch_mult must be a list",
    }.items():
        with pytest.raises(ValueError, match=said):
            load_checked_config(
                ["configs/latent-diffusion/cin256-v2.yaml"], [f"model.params.first_stage_config.params.{key}"]
            )


def whole_configs():
    """The packaged configs that are no part of another one."""
    folder = packaged_configs()
    files = [path for path in sorted(folder.glob("*/*.yaml")) if "/_" not in str(path)]
    read = {str(path.relative_to(folder)): read_config(path) for path in files}
    return {name: config for name, config in read.items() if OmegaConf.select(config, "model.target")}


def test_every_config_of_the_project_passes():
    configs = whole_configs()
    assert len(configs) > 60
    for name, config in configs.items():
        config.pop("components", None)
        check_config(config, before=f"{name}: ")


def test_every_model_section_of_latent_diffusion_passes():
    for section in MODELS.values():
        check_config({"model": section})


def test_components_are_checked_where_they_do_not_act_yet(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("components: {model: {params: {heads: {nois: 1}}}}\n")
    with pytest.raises(ValueError, match=r"components .*heads has an unknown key 'nois'"):
        load_checked_config([DIGITS, str(file)])


def test_words_over_components_act_on_a_member_and_are_refused_without_one():
    word = "components.model.base_learning_rate=123"
    assert load_checked_config([DIGITS], [word], component=True).model.base_learning_rate == 123
    with pytest.raises(ValueError, match="--start_from_pretrained"):
        load_checked_config([DIGITS], [word])


def test_data_named_by_words_are_checked_too():
    with pytest.raises(ValueError, match=r"a key 'parms' beside target and params: did you mean 'params'"):
        instantiate_from_config(read_data_config(["target=ldm.data.digits.Digits", "parms.split=test"]))
    with pytest.raises(ValueError, match="unknown section 'foo'"):
        read_data_config([f"{DIGITS}:train", "foo.bar=1"])


def test_keywords_that_are_handed_on_are_those_of_what_takes_them():
    known, open_ended = find_arguments(LatentDiffusion)
    assert not open_ended and {"scale_factor", "heads", "timesteps", "log_every_t"} <= known.keys()
    digits, _ = find_arguments(get_obj_from_str("ldm.data.captions.CaptionedDigits"))
    assert "image_size" in digits, "of another class than its base"
    check_arguments(dict, {"anything": 1}, "a dictionary")


@pytest.mark.parametrize("name", ["captions.CaptionedFolder", "lists.ListedImages", "folder.ImageFolder"])
def test_what_a_class_gives_to_its_base_itself_is_neither_needed_nor_taken(name):
    data = get_obj_from_str(f"ldm.data.{name}")
    given = {"root": "pictures", "image_size": 8, **({"file": "list.csv"} if "Listed" in name else {})}
    check_arguments(data, given, "data.params.train.params")
    with pytest.raises(ValueError, match="takes no 'relpaths'"):
        check_arguments(data, {**given, "relpaths": []}, "data.params.train.params")
    with pytest.raises(ValueError, match="needs root"):
        check_arguments(data, {"image_size": 8, **({"file": "a"} if "Listed" in name else {})}, "p")


def test_a_constructor_that_fails_on_its_params_is_named():
    node = {"target": "torch.nn.Conv2d", "params": {"in_channels": 2, "out_channels": 3, "kernel_size": "x"}}
    with pytest.raises(ValueError, match=r"torch\.nn\.Conv2d"):
        instantiate_from_config(node)
    with pytest.raises(ValueError, match="needs kernel_size"):
        instantiate_from_config(yaml.safe_load("{target: torch.nn.Conv2d, params: {in_channels: 2, out_channels: 3}}"))


def test_a_list_of_seeds_holds_seeds_and_a_number_of_them_is_a_count():
    check_range("seeds", (0, 1, 2), OPTIONS, "--seeds")
    with pytest.raises(ValueError, match="--seeds must be at least 1, got 0"):
        check_range("seeds", 0, OPTIONS, "--seeds")
