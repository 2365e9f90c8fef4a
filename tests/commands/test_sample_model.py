"""`decu sample model`: what image i depends on, resuming, sharing, interpolating, and what is written."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import load_state_dict, save_checkpoint
from ldm.commands.sample_model import SampleModel
from ldm.commands.shared import ModelSource, Placement
from ldm.diffusion.noise import ImageNoise, slerp
from ldm.diffusion.samplers import make_sampler, run
from ldm.diffusion.samplers.registry import sampler_options
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines.sampling import SamplePlan
from ldm.settings import Sampling, Training
from ldm.training.session import train
from tests.cli import call
from tests.conftest import tiny_config, tiny_model
from tests.exact import ExactNetwork

# Batches of other sizes round differently in the last bits; ten guided steps leave less than this.
ROUNDING = {"atol": 2e-4, "rtol": 2e-4}


class ExactGaussian(LatentDiffusion):
    """Its network is that of N(0.3, 0.5^2) for any label, so that samples have a closed form."""

    @property
    def network(self):
        return ExactNetwork(self, 0.3, 0.25)


FIVE = Sampling(steps=5)
TWO = Sampling(steps=2)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A config and a checkpoint."""
    folder = tmp_path_factory.mktemp("released")
    save_checkpoint({"state_dict": tiny_model().state_dict()}, folder / "model.ckpt")
    OmegaConf.save(OmegaConf.create({"model": tiny_config(guidance_scale=3.0)}), folder / "tiny.yaml")
    return ModelSource(base=str(folder / "tiny.yaml"), ckpt=str(folder / "model.ckpt"))


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional")
    config = tiny_config()
    params = config["params"]
    params["unet_config"]["params"].pop("context_dim")
    params["unet_config"]["params"]["use_spatial_transformer"] = False
    params["cond_stage_config"] = "__is_unconditional__"
    OmegaConf.save(OmegaConf.create({"model": config}), folder / "tiny.yaml")
    save_checkpoint({"state_dict": LatentDiffusion(**params).state_dict()}, folder / "model.ckpt")
    return ModelSource(base=str(folder / "tiny.yaml"), ckpt=str(folder / "model.ckpt"))


def latents(out):
    return load_state_dict(out / "latents.safetensors")["latents"]


def sample(source, out, sampling=FIVE, **options):
    """Run the command on the CPU, and return its folder."""
    return SampleModel(
        source=source, out=str(out), latents=True, sampling=sampling, place=Placement("cpu"), **options
    ).run()


def test_samples_are_the_models_own_and_do_not_depend_on_the_batch(released, tmp_path):
    out = sample(released, tmp_path / "a", n=11, classes=(4, 7), batch_size=16, pngs=True)
    model, labels = tiny_model(), torch.tensor([4, 7] * 5 + [4])
    expected = model.sample(labels, ImageNoise(42, tuple(range(11))), model.sampling_times(5), 3.0)
    torch.testing.assert_close(latents(out), expected, **ROUNDING)
    alone = sample(released, tmp_path / "b", n=11, classes=(4, 7), batch_size=3)
    torch.testing.assert_close(latents(alone), expected, **ROUNDING)

    content = np.load(out / "samples.npz")
    assert content["arr_0"].dtype == np.uint8 and content["arr_0"].shape == (11, 8, 8, 1)
    assert content["arr_1"].tolist() == labels.tolist()
    bytes_of = ((expected.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(content["arr_0"] - bytes_of).max() < 0.5 + 0.05
    pngs = sorted((out / "pngs").iterdir())
    assert [path.name for path in pngs] == [f"{index:06d}.png" for index in range(11)]
    assert np.array_equal(np.asarray(Image.open(pngs[3])), content["arr_0"][3, :, :, 0])
    with Image.open(out / "grid.png") as grid:
        assert grid.size[1] > 2 * grid.size[0], "two classes in turn are two columns of six rows"
    record = json.loads((out / "record.json").read_text())
    assert record["settings"]["scale"] == 3.0 and record["settings"]["steps"] == 5


def test_a_stopped_run_continues_and_a_longer_one_keeps_what_is_there(released, tmp_path, monkeypatch):
    seeded = Sampling(steps=5, seed=3)
    out = sample(released, tmp_path / "out", seeded, n=20)
    whole = np.load(out / "samples.npz")["arr_0"]
    kept, lost = (out / "parts" / f"{name}.npz" for name in ("0000000_8", "0000008_8"))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    lost.with_suffix(".json").unlink()
    (out / "samples.npz").unlink()
    drawn = []
    plain = SamplePlan.sample
    monkeypatch.setattr(SamplePlan, "sample", lambda plan, *rest: drawn.extend(rest[1]) or plain(plan, *rest))
    sample(released, out, seeded, n=20, batch_size=5)
    assert drawn == list(range(8, 16)), "only what was lost"
    assert kept.stat().st_mtime_ns == before
    difference = np.load(out / "samples.npz")["arr_0"].astype(int) - whole
    assert np.abs(difference).max() <= 1, "another batch size may round a byte differently"
    sample(released, out, seeded, n=24)
    assert len(np.load(out / "samples.npz")["arr_0"]) == 24
    assert drawn[8:] == list(range(16, 24))
    with pytest.raises(ValueError, match=r"other settings.*seed: 3 -> 4"):
        sample(released, out, Sampling(steps=5, seed=4), n=20)


def test_processes_share_the_work(released, tmp_path, monkeypatch, capsys):
    options = {"n_per_class": 9, "classes": (2, 0), "batch_size": 8}
    single = sample(released, tmp_path / "single", **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    shared = sample(released, tmp_path / "shared", **options)
    assert not (shared / "samples.npz").exists()
    assert "the one that finishes last" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    sample(released, tmp_path / "shared", **options)
    torch.testing.assert_close(latents(shared), latents(single), **ROUNDING)
    assert np.load(shared / "samples.npz")["arr_1"].tolist() == [2] * 9 + [0] * 9


def test_slerp_keeps_the_length_and_meets_its_ends():
    a, b = (ImageNoise(seed, (0,)).initial((1, 3, 8, 8))[0].double() for seed in (1, 2))
    b = b * a.norm() / b.norm()
    points = slerp(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(points[[0, 4]], torch.stack([a, b]))
    torch.testing.assert_close(points.flatten(1).norm(dim=1), a.norm().expand(5))
    # Equal weights: equal angles between neighbours, a quarter of the whole one.
    units = (points / a.norm()).flatten(1)
    angles = (units[:-1] * units[1:]).sum(1).arccos()
    torch.testing.assert_close(angles, (units[0] @ units[4]).arccos().expand(4) / 4)
    flat, tilted = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    torch.testing.assert_close(slerp(flat, tilted, torch.tensor([0.5]))[0], torch.tensor([[[0.5**0.5, 2 * 0.5**0.5]]]))
    torch.testing.assert_close(slerp(flat, 3 * flat, torch.tensor([0.5]))[0], 2 * flat)
    for wrong, reason in ((-flat, "opposite"), (0 * flat, "zero"), (a, "one shape")):
        with pytest.raises(ValueError, match=reason):
            slerp(flat, wrong, torch.tensor([0.5]))


def test_interpolation_runs_from_one_seeds_image_to_the_others(released, tmp_path):
    out = sample(released, tmp_path / "arc", interpolate=(5, 6), frames=4, classes=(1, 8))
    frames = latents(out)
    assert frames.shape == (8, 1, 8, 8)
    for index, seed in ((0, 5), (3, 6)):
        alone = sample(released, tmp_path / f"alone{seed}", Sampling(steps=5, seed=seed), n=1, classes=(1,))
        torch.testing.assert_close(frames[index], latents(alone)[0], **ROUNDING)
    assert np.load(out / "samples.npz")["arr_1"].tolist() == [1] * 4 + [8] * 4
    with pytest.raises(ValueError, match="one of --n, --n_per_class and --interpolate"):
        sample(released, tmp_path / "both", interpolate=(5, 6), n=3)
    with pytest.raises(ValueError, match="--epoch chooses a checkpoint of a run directory"):
        sample(released, tmp_path / "none", n=3, epoch=1)


# Dopri5 takes as many evaluations as a random network's stiffness asks; test_adaptive.py has fields of known solutions.
SOME = ("DDIM", "DDPM", "PLMS", "DPM-Solver++", "DPM-Solver-2", "DPM-Solver++SDE", "LMS", "Heun", "RK4", "Euler-time")


@pytest.mark.parametrize("name", SOME)
def test_every_sampler_samples(released, tmp_path, name):
    out = sample(released, tmp_path / "out", Sampling(sampler=name, steps=5), n=2, classes=(3,))
    assert bool(latents(out).isfinite().all())
    if name.startswith("D"):
        model, noise = tiny_model(), ImageNoise(42, (0, 1))
        x, chosen = noise.initial((2, 1, 8, 8)), make_sampler(name)
        expected = run(
            chosen(model.denoiser(torch.tensor([3, 3]), 3.0), model.schedule, x, model.sampling_times(5), noise=noise)
        )
        torch.testing.assert_close(latents(out), expected, **ROUNDING)
    if "eta" not in sampler_options(name):
        with pytest.raises(ValueError, match=f"sampler {name.replace('+', '.')} has no eta"):
            sample(released, tmp_path / "eta", Sampling(sampler=name, steps=5, eta=0.5))


def test_step_counts_respacings_and_spacings(released, tmp_path):
    for index, (given, steps) in enumerate((("7", 7), ("ddim25", 25), ("3,2,2", 7))):
        out = sample(released, tmp_path / str(index), Sampling(steps=given), n=1, classes=(1,))
        assert json.loads((out / "record.json").read_text())["settings"]["steps"] == steps
    for wrong in ("3,x", "dim3", "-1"):
        with pytest.raises(ValueError, match="or a respacing"):
            Sampling(steps=wrong)
    with pytest.raises(ValueError, match="leave out --spacing trailing"):
        sample(released, tmp_path / "both", Sampling(steps="3,2,2", spacing="trailing"))
    with pytest.raises(ValueError, match="from 1 to 1000"):
        sample(released, tmp_path / "many", Sampling(steps="1001"))
    with pytest.raises(ValueError, match="expected a number of steps"):
        Sampling(steps="0")


def test_more_steps_from_one_latent_change_the_sample_little(tmp_path):
    config = tiny_config(guidance_scale=1.0)
    config["target"] = "tests.commands.test_sample_model.ExactGaussian"
    OmegaConf.save(OmegaConf.create({"model": config}), tmp_path / "exact.yaml")
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "model.ckpt")
    source = ModelSource(base=str(tmp_path / "exact.yaml"), ckpt=str(tmp_path / "model.ckpt"))
    found = {
        steps: latents(sample(source, tmp_path / str(steps), Sampling(steps=steps, spacing="trailing"), n=4))
        for steps in (50, 100)
    }
    model = ExactGaussian(**config["params"])
    x = ImageNoise(42, (0, 1, 2, 3)).initial((4, 1, 8, 8))
    exact = model.network.exact.flow(x, 1000.0, 0.0)
    distance = {steps: (value - exact).square().mean().sqrt() for steps, value in found.items()}
    # DDIM is of first order: half the step, half the error (0.56 here, the times being coarse near the data).
    assert distance[100] < 0.65 * distance[50] < 0.65 * 0.1 * 0.5, "a tenth of the data's standard deviation"
    assert (found[50] - found[100]).square().mean().sqrt() < 0.05 * 0.5
    assert (found[50] - found[50].roll(1, 0)).square().mean().sqrt() > 0.5, "while other latents give other samples"


def test_averaged_weights_are_the_default(tmp_path):
    model = tiny_model(use_ema=True)  # the averages keep what the constructor drew, the weights are drawn anew
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "model.ckpt")
    OmegaConf.save(OmegaConf.create({"model": tiny_config(use_ema=True)}), tmp_path / "tiny.yaml")
    source = ModelSource(base=str(tmp_path / "tiny.yaml"), ckpt=str(tmp_path / "model.ckpt"))
    options = {"sampling": Sampling(steps=3), "n": 2, "classes": (5,)}
    noise, labels = ImageNoise(42, (0, 1)), torch.tensor([5, 5])
    own = model.sample(labels, noise, model.sampling_times(3))
    with model.ema_scope():
        average = model.sample(labels, noise, model.sampling_times(3))
    assert (own - average).abs().max() > 0.1
    torch.testing.assert_close(latents(sample(source, tmp_path / "ema", **options)), average, **ROUNDING)
    torch.testing.assert_close(
        latents(sample(replace(source, ema=False), tmp_path / "own", **options)), own, **ROUNDING
    )


def test_base_runs_and_runs_of_members_can_be_sampled(tmp_path):
    save_checkpoint({"state_dict": tiny_model().state_dict()}, tmp_path / "trunk.ckpt")
    digits = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}
    config = {
        "paths": {"trunk": str(tmp_path / "trunk.ckpt")},
        "model": tiny_config(pretrained_path="${paths.trunk}"),
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 8, "num_workers": 0, "train": digits}},
        "lightning": {"callbacks": {"image_logger": {"params": {"disabled": True}}}},
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "tiny.yaml")
    quiet = {"max_steps": 1, "enable_progress_bar": False, "log_every_n_steps": 1}
    given = {"base": (f"{tmp_path}/tiny.yaml",), "scale_lr": False, "logdir": f"{tmp_path}/logs", "trainer": quiet}
    for more in ({}, {"start_from_pretrained": True, "seed": 1}):
        folder = train(Training(**given, **more, gpus="0,"))
        out = sample(ModelSource(run=str(folder)), folder / "samples", TWO, n=2)
        kept = load_state_dict(folder / "checkpoints" / "last.ckpt")
        model = tiny_model()
        model.load_state_dict(kept, strict=not more)
        expected = model.sample(torch.tensor([0, 1]), ImageNoise(42, (0, 1)), model.sampling_times(2))
        torch.testing.assert_close(latents(out), expected, **ROUNDING)
    with pytest.raises((ValueError, FileNotFoundError), match="epoch"):
        sample(ModelSource(run=str(folder)), tmp_path / "other", TWO, n=2, epoch=7)
    (tmp_path / "trunk.ckpt").rename(tmp_path / "moved.ckpt")
    with pytest.raises(ValueError, match="--pretrained"):
        sample(ModelSource(run=str(folder)), tmp_path / "lost", TWO, n=2)
    source = ModelSource(run=str(folder), pretrained=str(tmp_path / "moved.ckpt"))
    moved = sample(source, tmp_path / "found", TWO, n=2)
    assert torch.equal(latents(moved), latents(out))


def test_unconditional_models_take_no_classes(unconditional, tmp_path):
    out = sample(unconditional, tmp_path / "out", TWO, n=3)
    content = np.load(out / "samples.npz")
    assert content["arr_0"].shape == (3, 8, 8, 1) and "arr_1" not in content
    for options, reason in (
        ({"sampling": TWO, "classes": (1,)}, "unconditional"),
        ({"sampling": Sampling(steps=2, scale=3)}, "no guidance"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample(unconditional, tmp_path / "wrong", **options)


def test_the_null_class_may_be_named_and_others_are_refused(released, tmp_path):
    out = sample(released, tmp_path / "null", classes=(10,), n=1)
    model = tiny_model()
    expected = model.sample(torch.tensor([10]), ImageNoise(42, (0,)), model.sampling_times(5))
    torch.testing.assert_close(latents(out), expected, **ROUNDING)
    for options, reason in (
        ({"classes": (11,)}, r"classes must lie in 0\.\.10"),
        ({"classes": ("cat",)}, "no class named 'cat'"),
        ({"n_per_class": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample(released, tmp_path / "wrong", **options)


def test_foreign_outputs_and_first_stages_are_refused(released, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.npz").touch()
    with pytest.raises(FileExistsError, match="choose another"):
        sample(released, tmp_path / "out")
    with pytest.raises(ValueError, match="--base CONFIG with --ckpt"):
        sample(replace(released, ckpt=None), tmp_path / "no_checkpoint")
    coder = {"double_z": False, "z_channels": 3, "resolution": 8, "in_channels": 1, "out_ch": 1, "ch": 32}
    coder |= {"ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}
    params = {"ddconfig": coder, "lossconfig": {"target": "torch.nn.Identity"}, "n_embed": 4, "embed_dim": 3}
    stage = OmegaConf.create({"model": {"target": "ldm.models.autoencoder.VQModel", "params": params}})
    OmegaConf.save(stage, tmp_path / "stage.yaml")
    with pytest.raises(ValueError, match="nothing to sample"):
        sample(replace(released, base=str(tmp_path / "stage.yaml")), tmp_path / "stage")


def test_classes_have_names_and_words_say_the_same(tmp_path):
    """The one test of the command line's own words."""
    folder = tmp_path / "fashion"
    data = {"target": "tests.commands.test_sample_model.Named"}
    config = {"model": tiny_config(), "data": {"params": {"train": data}}}
    save_checkpoint({"state_dict": tiny_model().state_dict()}, folder / "model.ckpt")
    OmegaConf.save(OmegaConf.create(config), folder / "tiny.yaml")
    source = ModelSource(base=str(folder / "tiny.yaml"), ckpt=str(folder / "model.ckpt"))
    expected = latents(sample(source, tmp_path / "numbers", TWO, n_per_class=1, classes=(7, 10)))
    words = ["--base", source.base, "--ckpt", source.ckpt, "--classes", "class g", 10, "--n_per_class", 1]
    words += ["--ddim_steps", 2, "--ddim_eta", 0, "--device", "cpu", "--latents", "--out", tmp_path / "names"]
    assert torch.equal(latents(call("sample model", words)), expected)
    assert np.load(tmp_path / "names" / "samples.npz")["arr_1"].tolist() == [7, 10]


class Named:
    """A data set whose classes are "class z", "class a", "class b", ..."""

    class_names = tuple(f"class {letter}" for letter in "zabcdefghi")
