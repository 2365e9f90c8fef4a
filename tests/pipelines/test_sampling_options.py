"""Options of samplers and of their times through a loaded model, and through the words of a command line."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.commands.line import load_command, parse
from ldm.commands.shared import ModelSource
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.ode.runge_kutta import heun
from ldm.diffusion.samplers import make_times, run
from ldm.diffusion.samplers.singlestep import dpm_solver_2
from ldm.options import read_pairs
from ldm.settings import Sampling
from ldm.settings.names import SPACING_NAMES, choose_name
from tests.conftest import tiny_config, tiny_model

EDM = {
    "schedule_config": {"target": "ldm.diffusion.schedule.EDMSchedule"},
    "parameterization": "edm",
    "clip_denoised": True,
}
WINDOW = {"S_min": 0.01, "S_max": 1.0, "S_noise": 1.007}
LABELS = [3, 4]


def load(folder, sampling, **params):
    """A loaded tiny model whose config says how EDM's churn acts, as DDAE's configs do."""
    config = OmegaConf.create({"model": tiny_config(**params), "churn": WINDOW})
    OmegaConf.save(config, folder / "tiny.yaml")
    save_checkpoint({"state_dict": tiny_model(**params).state_dict()}, folder / "model.ckpt")
    return ModelSource(base=str(folder / "tiny.yaml"), ckpt=str(folder / "model.ckpt")).load(sampling, device="cpu")


@pytest.fixture(scope="module")
def edm(tmp_path_factory):
    return load(tmp_path_factory.mktemp("edm"), Sampling("Heun", 4), **EDM)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return load(tmp_path_factory.mktemp("table"), Sampling(steps=4))


def by_hand(pipeline, solver, times, std, **options):
    """Latents of two images by the library's own functions."""
    noise, labels = ImageNoise(42, (0, 1)), torch.tensor(LABELS)
    x = noise.initial((2, 1, 8, 8)) * std
    with torch.no_grad():
        return run(solver(pipeline.denoiser(labels), pipeline.model.schedule, x, times, noise=noise, **options))


def test_edms_churn_and_levels(edm):
    """EDM's generate.py with --S_churn, --rho, --sigma_min and --sigma_max; it begins at sigma_max."""
    options = {"S_churn": 40, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}
    pipeline = edm.with_(options=options, rho=5.0, sigma_min=0.01, sigma_max=20.0)
    times = make_times(edm.model.schedule, 4, "karras", rho=5, sigma_min=0.01, sigma_max=20)
    assert torch.equal(pipeline.times, times) and pipeline.initial_std == 20 and edm.initial_std == 80
    torch.testing.assert_close(pipeline.sample_latents(LABELS, (0, 1)), by_hand(edm, heun, times, 20, **options))
    described = pipeline.describe_sampling()
    assert (described["rho"], described["sigma_max"]) == (5, 20) and described["sampler_options"] == options
    assert not {"rho", "sampler_options"} & set(edm.describe_sampling())


def test_ddaes_eta_is_churn_in_the_window_of_the_config(edm):
    pipeline = edm.with_(eta=0.5)
    assert pipeline.sampler_options == WINDOW and edm.sampler_options == {}
    expected = by_hand(edm, heun, edm.times, 80, eta=0.5, **WINDOW)
    torch.testing.assert_close(pipeline.sample_latents(LABELS, (0, 1)), expected)
    assert edm.with_(eta=0.5, options={"S_max": 2.0}).sampler_options == {**WINDOW, "S_max": 2.0}


def test_bayesdiffs_template(table):
    """dpm_solver_2 on times even in log SNR, to alpha-bar_0."""
    pipeline = table.with_(sampler="dpm_2", spacing="logSNR")
    times = make_times(table.model.schedule, 4, "logsnr")
    assert torch.equal(pipeline.times, times) and times[-1] == 1
    assert pipeline.sampling.sampler == "DPM-Solver-2"
    assert pipeline.with_(steps=5).describe_sampling()["spacing"] == "logsnr"
    solver = lambda *args, noise: dpm_solver_2(*args)  # noqa: E731
    torch.testing.assert_close(pipeline.sample_latents(LABELS, (0, 1)), by_hand(table, solver, times, 1))


def test_ancestral_samplers_draw_noise_unless_told_otherwise(table):
    assert table.eta == 0 and table.with_(sampler="Euler-ancestral").eta == 1
    ddim = table.with_(eta=1.0).sample_latents(LABELS, (0, 1))
    torch.testing.assert_close(table.with_(sampler="Euler-ancestral").sample_latents(LABELS, (0, 1)), ddim)
    quiet = table.with_(sampler="Euler-ancestral", eta=0.0)
    assert quiet.describe_sampling()["eta"] == 0
    torch.testing.assert_close(quiet.sample_latents(LABELS, (0, 1)), table.sample_latents(LABELS, (0, 1)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"S_chrn": 4}}, r"DDIM has no S_chrn; its options: eta, temperature"),
        ({"sampler": "Heun", "options": {"S_chrn": 4}}, r"Heun has no S_chrn; .* did you mean 'S_churn'\?"),
        ({"sampler": "RK4", "options": {"order": 4}}, "RK4 has no order; its options: none"),
        ({"options": {"eta": 1.0}}, "--eta and --variance are options of their own"),
        ({"sampler": "DPM-Solver-2", "eta": 0.5}, "DPM-Solver-2 has no eta"),
        ({"rho": 3.0}, "rho belong to the spacings"),
        ({"spacing": "karras", "sigma_max": 1e4}, "must lie in the levels"),
    ],
)
def test_options_without_effect_are_errors(table, changes, words):
    with pytest.raises(ValueError, match=words):
        table.with_(**changes).check()


def parsed(*words):
    return parse(load_command("sample model"), ["--run", "R", "--out", "O", *words], "sample model").sampling


def test_words_of_edm_and_of_bayesdiff():
    """EDM-ES' and BayesDiff's spellings, beside ours."""
    theirs = parsed("--solver", "heun", "--S_churn=40", "--S_min", "0.05", "--rho", "7", "--sigma_max", "80")
    ours = parsed("--sampler", "Heun", "--sampler_options", "S_churn=40", "S_min=0.05", "--rho=7", "--sigma_max=80")
    assert theirs == ours and ours.options == {"S_churn": 40, "S_min": 0.05}
    both = parsed("--sampler_options", "S_min=0.05", "--seed", "3", "--S_churn", "40")
    assert both.options == {"S_churn": 40, "S_min": 0.05} and both.seed == 3
    template = parsed("--sampler", "dpm_2", "--skip_type", "logSNR", "--timesteps", "50")
    assert template == Sampling("DPM-Solver-2", 50, spacing="logsnr")


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["--sampler", "DPM-Solver2"], "didyoumean'DPM-Solver-2'"),
        (["--sampler_options", "r=1", "r=2"], "risgiventwice"),
    ],
)
def test_wrong_words_are_answered_with_the_nearest(words, nearest, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*words)
    assert stop.value.code == 2
    assert nearest in "".join(capsys.readouterr().err.split()).replace("│", "")


def test_names_and_pairs_are_read():
    assert choose_name(["karras"], SPACING_NAMES) == "karras"
    with pytest.raises(ValueError, match=r"got 'karas'; did you mean 'karras'\?"):
        choose_name(["karas"], SPACING_NAMES)
    assert read_pairs(["a=1", "b=0.5", "c=inf", "d=True", "e=heun"]) == {
        "a": 1,
        "b": 0.5,
        "c": float("inf"),
        "d": True,
        "e": "heun",
    }
    with pytest.raises(ValueError, match="expected NAME=VALUE, got 'S_churn'"):
        read_pairs(["S_churn"])
