"""Published configs and checkpoints: sizes, keys, averages, what loads strictly, and DECU's own command.

The released files are gigabytes; here the same keys stand in files of a tiny width.
"""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from ldm.checkpoint import load_checkpoint, save_checkpoint
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.config import load_config, read_config
from ldm.training.released import read_keys
from ldm.util import instantiate_from_config
from tests.cli import call
from tests.conftest import golden_json, tiny_config, tiny_model

CONFIGS = Path(__file__).parent.parent.parent / "configs"
CIN = CONFIGS / "latent-diffusion" / "cin256-v2.yaml"
PUBLISHED = CONFIGS / "latent-diffusion" / "cin256-v2-published.yaml"
KEYS = CONFIGS / "latent-diffusion" / "cin256-v2.keys.txt"
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("[!_]*/[!_]*.yaml"))
TABLE = "cond_stage_model.embedding.weight"
# The network's size in millions (Rombach et al. 2022, the tables of hyperparameters and of ImageNet).
FACES = ("celebahq-ldm-vq-4", "ffhq-ldm-vq-4", "lsun_bedrooms-ldm-vq-4")
UNET_MILLIONS = dict.fromkeys(FACES, 274) | {"lsun_churches-ldm-kl-8": 294, "cin-ldm-vq-f8": 395}
UNET_MILLIONS |= {"cin256-v2": 400, "cin256-v2-published": 400}
TINY = [
    "model.params.unet_config.params.model_channels=32",
    "model.params.unet_config.params.context_dim=8",
    "model.params.cond_stage_config.params.embed_dim=8",
    "model.params.first_stage_config.params.ddconfig.ch=32",
    "model.params.first_stage_config.params.n_embed=16",
]


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def meta_model(*paths: Path, component: bool = False) -> nn.Module:
    """The full-size model without storage, its paths left out."""
    config = load_config([str(path) for path in paths], component=component)
    if "paths" in config:
        config.paths = dict.fromkeys(config.paths)
    with torch.device("meta"):
        return instantiate_from_config(config.model)


def count_by_hand(config: dict) -> int:
    """Parameters of a first stage, from its description: convolutions, norms, residual and attention blocks."""

    def conv(a, b, kernel=3):
        return a * b * kernel**2 + b

    def block(a, b):
        return 2 * a + conv(a, b) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    def attention(c):
        return 2 * c + 4 * conv(c, c, 1) if config["ddconfig"].get("attn_type") != "none" else 0

    parts, z, embed = config["ddconfig"], config["ddconfig"]["z_channels"], config["embed_dim"]
    widths = [parts["ch"] * factor for factor in parts["ch_mult"]]
    attends = [parts["resolution"] // 2**level in parts["attn_resolutions"] for level in range(len(widths))]
    double, deep = 2 if parts["double_z"] else 1, parts["num_res_blocks"]
    middle = 2 * block(widths[-1], widths[-1]) + attention(widths[-1])
    encoder = conv(parts["in_channels"], parts["ch"]) + middle + 2 * widths[-1] + conv(widths[-1], double * z)
    decoder = conv(z, widths[-1]) + middle + 2 * widths[0] + conv(widths[0], parts["out_ch"])
    before = parts["ch"]
    for level, (width, attend) in enumerate(zip(widths, attends, strict=True)):
        below = widths[min(level + 1, len(widths) - 1)]
        extra = attention(width) if attend else 0
        encoder += block(before, width) + (deep - 1) * block(width, width) + deep * extra
        decoder += block(below, width) + deep * block(width, width) + (deep + 1) * extra
        encoder += conv(width, width) if level < len(widths) - 1 else 0
        decoder += conv(width, width) if level else 0
        before = width
    outside = conv(double * z, double * embed, 1) + conv(embed, z, 1) + config.get("n_embed", 0) * embed
    return encoder + decoder + outside


@pytest.mark.parametrize("name", NAMES)
def test_every_config_says_what_it_reproduces_and_builds(name):
    path = CONFIGS / name
    first_line = path.read_text().split("\n", 1)[0]
    assert re.match(r"# .*\w{3}", first_line), "the first line is a comment"
    plain = read_config(path)
    if "target" not in plain.get("model", {}):
        if "model" in plain or "components" in plain:
            base, own = re.search(r"--base configs/(\S+) configs/([^\s)]+)", first_line).groups()
            assert own == name, "it says what it goes on top of"
            model = meta_model(CONFIGS / base, path, component="components" in plain)
            assert isinstance(model, LatentDiffusion)
        return
    config, model = load_config([str(path)]), meta_model(path)
    if path.stem in UNET_MILLIONS:
        assert parameters(model.model) / 1e6 == pytest.approx(UNET_MILLIONS[path.stem], abs=1)
        stage = OmegaConf.to_container(config.model.params.first_stage_config.params, resolve=False)
        assert parameters(model.first_stage_model) == count_by_hand(stage)
    if path.parent.name == "autoencoder":
        stage = OmegaConf.to_container(config.model.params, resolve=False)
        assert parameters(model) - parameters(model.loss) == count_by_hand(stage)
    if "components" in plain:
        assert isinstance(meta_model(path, component=True), LatentDiffusion)


@pytest.mark.parametrize("name", [name for name in NAMES if "paths" in read_config(CONFIGS / name)])
def test_paths_are_set_in_one_place(name):
    config = read_config(CONFIGS / name)
    words = [f"paths.{key}=elsewhere/{key}" for key in config.paths]
    moved = OmegaConf.to_container(load_config([str(CONFIGS / name)], words, needs=()), resolve=True)
    assert moved.pop("paths").keys() == config.paths.keys()
    for key in config.paths:
        assert f"elsewhere/{key}" in str(moved), f"paths.{key} is used"
    assert "'./" not in str(moved), "every place of a file goes through `paths`"


def test_sizes_that_were_published_to_the_last_digit():
    model = meta_model(CIN)
    parts = map(parameters, (model.model, model.first_stage_model, model.cond_stage_model))
    assert list(parts) == [400_920_579, 55_322_782, 512_512]
    stage = meta_model(CONFIGS / "autoencoder" / "autoencoder_kl_32x32x4.yaml")
    assert parameters(stage) - parameters(stage.loss) == 83_653_863, "the first stage of Stable Diffusion"
    assert model.latent_shape == (3, 64, 64) and (model.null_class, model.n_classes) == (1000, 1000)
    without = meta_model(CONFIGS / "latent-diffusion" / "cin-ldm-vq-f8.yaml")
    assert (without.null_class, without.n_classes) == (None, 1000), "every row is a class"


@pytest.mark.parametrize("path", [CIN, PUBLISHED])
def test_the_released_keys_are_the_models(path):
    state = {name: tuple(value.shape) for name, value in meta_model(path).state_dict().items()}
    assert len(state) == 906
    assert list(state.items()) == list(read_keys(KEYS).items())


def test_the_committed_keys_are_the_golden():
    golden = golden_json("keys_cin256")["keys"]
    assert list(read_keys(KEYS).items()) == [(name, tuple(shape)) for name, shape, _ in golden]


def test_the_published_config_differs_where_it_says():
    ours, theirs = (read_config(path) for path in (CIN, PUBLISHED))

    def flat(node, prefix=""):
        if not isinstance(node, dict):
            return {prefix: node}
        return {key: value for name in node for key, value in flat(node[name], f"{prefix}.{name}").items()}

    ours, theirs = (flat(OmegaConf.to_container(config, resolve=False)) for config in (ours, theirs))
    heads = ".components.model.params.heads"
    assert {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)} == {
        ".model.params.weight_decay",
        ".model.params.cond_stage_config.params.ucg_rate",
        *(f"{heads}.{name}" for name in ("init", "noise", "null_class")),
    }
    assert theirs[".model.params.weight_decay"] == 0.01
    assert (theirs[f"{heads}.init"], theirs[f"{heads}.null_class"]) == ("random", "random")
    assert ours[".model.base_learning_rate"] == theirs[".model.base_learning_rate"] == 1e-5


def test_the_published_choices_on_digits_are_those_on_imagenet():
    """On top of digits.yaml; the rate takes a row of a step every step as far as the published 875,000 x 1e-5 did."""
    folder = CONFIGS / "latent-diffusion"
    files = [str(folder / name) for name in ("digits.yaml", "digits-published.yaml")]
    ours, theirs = (load_config(given, component=True).model for given in (files, [str(PUBLISHED)]))
    assert {key: ours.params.heads[key] for key in theirs.params.heads} == theirs.params.heads
    assert (ours.params.weight_decay, ours.params.scheduler_config) == (theirs.params.weight_decay, None)
    steps = load_config(files, component=True).lightning.trainer.max_steps
    assert ours.base_learning_rate * steps == pytest.approx(1.8)
    plain = load_config(files[:1], component=True)
    assert load_config(files).model == load_config(files[:1]).model, "the trunk is the same"
    assert load_config(files, component=True).data == plain.data


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint with the 906 keys at a tiny width, its state, and the words that make the config as small."""
    folder = tmp_path_factory.mktemp("released")
    model = instantiate_from_config(load_config([str(CIN)], [*TINY, "paths.first_stage=null"]).model)
    source = torch.Generator().manual_seed(0)
    state = {}
    for name, value in model.state_dict().items():
        drawn = name.endswith(("weight", "bias")) and not name.startswith("first_stage_model.quantize")
        state[name] = 0.02 * torch.randn(value.shape, generator=source) if drawn else value.clone()
    assert list(state) == list(read_keys(KEYS))
    save_checkpoint({"state_dict": state, "global_step": 178_000}, folder / "model.ckpt")
    return folder / "model.ckpt", state, [*TINY, "paths.first_stage=null", f"paths.pretrained={folder / 'model.ckpt'}"]


def test_the_keys_load_strictly_through_the_config(released):
    path, state, words = released
    model = instantiate_from_config(load_config([str(CIN)], [*words, f"model.params.ckpt_path={path}"]).model)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    fewer = {name: value for name, value in state.items() if not name.startswith("model.diffusion_model.out.")}
    save_checkpoint({"state_dict": {**fewer, "extra.weight": torch.zeros(1)}}, path.with_name("bad.ckpt"))
    with pytest.raises(ValueError, match=r"4 missing, 1 unknown") as error:
        model.init_from_ckpt(str(path.with_name("bad.ckpt")))
    for name in ("out.0.weight", "out.0.bias", "out.2.weight", "out.2.bias"):
        assert f"model.diffusion_model.{name}" in str(error.value)
    assert "unknown to the model: extra.weight" in str(error.value)


def test_a_standalone_first_stage_loads_without_its_loss(released, tmp_path):
    _, state, words = released
    prefix = "first_stage_model."
    stage = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    loss = {"loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4), "loss.perceptual_loss.lin0.x": torch.zeros(1)}
    save_checkpoint({"state_dict": {**stage, **loss}}, tmp_path / "vq-f4.ckpt")
    words = [*words, f"paths.first_stage={tmp_path / 'vq-f4.ckpt'}"]
    model = instantiate_from_config(load_config([str(CIN)], words).model)
    loaded = model.first_stage_model.state_dict()
    assert loaded.keys() == stage.keys()
    assert all(torch.equal(loaded[name], value) for name, value in stage.items())
    save_checkpoint({"state_dict": {**stage, "other.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.weight"):
        model.first_stage_model.init_from_ckpt(str(tmp_path / "other.ckpt"))


def averaged_checkpoint(path) -> tuple[dict, dict]:
    """A file with EMA copies under their published names, each copy its weight plus one; (weights, copies)."""
    state = tiny_model().state_dict()
    copies = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": value + 1
        for name, value in state.items()
        if name.startswith("model.")
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    save_checkpoint({"state_dict": {**state, **counters, **copies}}, path)
    return state, copies


@pytest.mark.parametrize("use_ema", [True, False])
def test_averages_are_read_kept_or_taken(tmp_path, use_ema):
    state, copies = averaged_checkpoint(tmp_path / "ema.ckpt")
    assert "model_ema.diffusion_modelinput_blocks00weight" in copies
    model = instantiate_from_config(tiny_config(use_ema=use_ema, ckpt_path=str(tmp_path / "ema.ckpt")))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert any(name.startswith("model_ema.") for name in loaded) == use_ema
    if use_ema:
        assert all(torch.equal(loaded[name], value) for name, value in copies.items())
        assert int(model.model_ema.num_updates) == 7
        with model.ema_scope():
            torch.testing.assert_close(model.model.diffusion_model.out[2].bias, model.model_ema.diffusion_modelout2bias)
    model.init_from_ckpt(str(tmp_path / "ema.ckpt"), use_averaged=True)
    for name, value in model.state_dict().items():
        if not name.startswith("model_ema."):
            assert torch.equal(value, state[name] + 1 if name.startswith("model.") else state[name]), name


def test_a_checkpoint_of_lightning_1_loads(tmp_path):
    """It has callback classes as keys, which must neither be imported nor refused."""
    state = tiny_model().state_dict()
    content = {
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {ModelCheckpoint: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
    }
    torch.save(content, tmp_path / "old.ckpt")
    model = instantiate_from_config(tiny_config(ckpt_path=str(tmp_path / "old.ckpt")))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    (key,) = load_checkpoint(tmp_path / "old.ckpt")["callbacks"]
    assert key is not ModelCheckpoint


@pytest.fixture
def imagenet(tmp_path):
    """Two classes of three pictures in ImageNet's layout, and what member 0 sees of them."""
    source = torch.Generator().manual_seed(5)
    for part in ("data_train", "data_val"):
        for synset in ("n01440764", "n01443537"):
            folder = tmp_path / "imagenet_data" / part / "data" / synset
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = torch.randint(0, 256, (40, 36, 3), generator=source).byte().numpy()
                Image.fromarray(pixels).save(folder / f"{synset}_{number}.JPEG")
    lines = ["n01440764/n01440764_2.JPEG", "n01443537/n01443537_0.JPEG"]
    (tmp_path / "imagenet_data/data_train/filelist_comp0_binned_classes.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "imagenet_data"


@pytest.mark.parametrize("path", [CIN, PUBLISHED])
def test_the_published_command_trains_a_component(released, imagenet, tmp_path, path):
    """DECU's README, word for word, with the sizes and places of a test."""
    _, state, words = released
    command = (
        f"--base {path} -t --gpus 0, --scale_lr False --start_from_pretrained --logdir {tmp_path}/storelogs --seed 0 "
        "--component 0 --ensemble_name bootstrapped --overwrite_data_root "
    )
    small = ["--max_steps", "1", "--enable_progress_bar", "False", "--log_every_n_steps", "1"]
    small += ["data.params.batch_size=2", "data.params.num_workers=0", "data.params.train.params.config.size=32"]
    small += ["data.params.validation.params.config.size=32", *words]
    with pytest.raises(ValueError, match="set data_root or --overwrite_data_root"):
        call("train", [*command.split(), tmp_path / "nowhere", *small])
    folder = call("train", [*command.split(), imagenet, *small])
    content = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert list(content["state_dict"]) == [TABLE]
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-5
    published = path == PUBLISHED
    assert content["optimizer_states"][0]["param_groups"][0]["weight_decay"] == (0.01 if published else 0)
    table, trunk = content["state_dict"][TABLE], state[TABLE]
    assert torch.equal(table[1000], trunk[1000]) is not published, "the null class is the trunk's, or random"
    assert table.std().item() == pytest.approx(1.0 if published else 0.02 * 1.25**0.5, rel=0.05)


def test_averages_start_from_a_file_without_them(tmp_path):
    """A trunk without EMA copies must not leave the averages at the constructor's random weights."""
    trunk = tiny_model(seed=3).state_dict()
    save_checkpoint({"state_dict": trunk}, tmp_path / "trunk.ckpt")
    model = tiny_model(seed=4, use_ema=True)
    model.init_from_ckpt(str(tmp_path / "trunk.ckpt"))
    with model.ema_scope():
        for name, value in model.model.state_dict().items():
            assert torch.equal(value, trunk[f"model.{name}"]), name
