"""No option is without effect: what a command has no use for is refused, with the option that it goes with."""

import pytest

from ldm.arguments import check_arguments
from ldm.commands.line import load_command, parse, run_command
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel

IMAGES = ["--images", "x", "--ref", "r", "--out", "o"]
LAPLACE = ["--run", "r", "--posterior", "p", "--out", "o"]
DIGITS = "configs/latent-diffusion/digits.yaml"
WITHOUT_EFFECT = [
    ("evaluate metrics", [*IMAGES, "--no-ema"], "go with a model to sample from"),
    ("evaluate metrics", [*IMAGES, "--pretrained", "p"], "go with a model to sample from"),
    ("evaluate metrics", [*IMAGES, "--metrics", "fid", "--sigma", "3"], "--sigma acts only with --metrics cmmd"),
    ("evaluate metrics", [*IMAGES, "--metrics", "is", "--kid_subsets", "9"], "acts only with --metrics kid"),
    ("evaluate metrics", [*IMAGES, "--metrics", "fid", "--splits", "10"], "--splits acts only with --metrics is"),
    ("evaluate metrics", [*IMAGES, "--metrics", "sfid", "--resamples", "9"], "--resamples acts only with --metrics is"),
    ("evaluate trainings", [*IMAGES[2:], "--ensemble", "e", "--n", "3", "--sigma", "3"], "acts only with --metrics"),
    (
        "sample model",
        ["--run", "r", "--n", "1", "--out", "o", "--scale", "1e39"],
        "--scale must be 0 or of a size from",
    ),
    ("exposure choose", ["--run", "r", "--out", "o", "--ref", "x"], "--ref acts only with --method search"),
    ("uncertainty ood", ["--ensemble", "e", "--pictures", "p", "--out", "o", "--no-ema"], "are of a model of --run"),
    ("sample restore", ["--run", "r", "--out", "o", "--data", "x", "--split", "train"], "--data names others"),
    ("laplace sweep", [*LAPLACE, "--sigma_noise", "3"], "--sigma_noise has no effect here: --sigmas names"),
    ("laplace sweep", [*LAPLACE, "--prior_precision", "3"], "--prior_precision has no effect here"),
    ("laplace resample", [*LAPLACE, "--cut", "1", "--variants", "1"], "--variants must be at least 2"),
    ("laplace resample", [*LAPLACE, "--cut", "1", "--kinds", "uniform", "uniform"], "--kinds names uniform twice"),
    ("evaluate metrics", [*IMAGES, "--metrics", "is", "fid", "is"], "--metrics names is twice"),
    ("value", [*LAPLACE, "--k", "1", "2", "1"], "--k takes numbers of further pictures from 1, each once"),
    ("value", [*LAPLACE, "--every", "5"], "--every has no effect here: this command draws neither"),
    ("attribute", [*LAPLACE, "--samples", "s", "--draws", "2"], "--draws has no effect here"),
    ("laplace sweep", [*LAPLACE[:-1], ""], "--out is followed by nothing"),
    ("data bins", ["--base", DIGITS, "--out="], "--out is followed by nothing"),
    ("train", ["--base", DIGITS, "-t", "--ensemble_name", ""], "--ensemble_name is followed by nothing"),
    ("cluster train", ["--ensemble_name", "e", "--members", "2", "--slurm", ""], "--slurm is followed by nothing"),
]


def test_an_empty_text_is_a_prompt():
    words = ["--run", "r", "--n", "1", "--prompt", "", "--out", "o"]
    assert parse(load_command("sample model"), words, "decu").source.texts.prompt == ("",)


@pytest.mark.parametrize(("name", "words", "message"), WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(name, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(load_command(name), words, "decu")
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("sample model", ["--run", "{file}", "--n", "1"], "{file} is a file that lies in no run directory"),
        ("train", ["--resume", "{file}"], "{file} is a file that lies in no run directory"),
        ("evaluate metrics", ["--images", "{file}", "--ref", "{file}x"], "there is no reference {file}x"),
        ("evaluate metrics", ["--images", "{file}", "--ref", "{file}"], "--features is needed, since the reference"),
        ("uncertainty study", ["--config", DIGITS, "--first_stage", "{file}"], "this model has none: leave it out"),
        ("data prepare", ["--dataset", "mnist,kmnist", "--root", "{file}"], "mnist: a part of the path {file}/"),
    ],
)
def test_what_is_named_is_called_what_it_is(name, words, message, tmp_path):
    file = tmp_path / "page.ckpt"
    file.write_text("<!DOCTYPE html>")
    out = {"sample model": "--out", "evaluate metrics": "--out", "uncertainty study": "--logdir"}
    place = [out[name], str(tmp_path / "out")] if name in out else []
    with pytest.raises(SystemExit) as stop:
        run_command(name, [*(word.format(file=file) for word in words), *place])
    found = str(stop.value.code)
    assert message.format(file=file) in found and "\n" not in found and not (tmp_path / "out").exists()


ACTING = [
    ("evaluate metrics", [*IMAGES, "--sigma", "3", "--splits", "5"]),  # metrics are chosen by what can be measured
    ("evaluate metrics", [*IMAGES, "--metrics", "fid", "cmmd", "--sigma", "3"]),
    ("evaluate metrics", [*IMAGES[2:], "--run", "x", "--n", "3", "--no-ema", "--steps", "3"]),
    ("laplace sweep", [*LAPLACE, "--temperature", "2"]),
    ("value", [*LAPLACE, "--prior_precision", "3"]),
]


@pytest.mark.parametrize(("name", "words"), ACTING)
def test_the_same_options_are_taken_where_they_act(name, words):
    assert parse(load_command(name), words, "decu")


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        (Encoder, {"ch": 1.5}, "ddconfig.ch must be a whole number, got 1.5"),
        (Decoder, {"num_res_block": 2}, "did you mean 'num_res_blocks'"),
        (UNetModel, {"num_res_blocks": 2**31}, "num_res_blocks must be at least 0 and at most 1000"),
        (UNetModel, {"transformer_depth": 0}, "transformer_depth must be at least 1"),
    ],
)
def test_numbers_of_a_network_are_checked_before_it_is_built(target, params, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(target, params, "ddconfig", complete=False)


def test_a_first_stage_checks_its_coders():
    from ldm.util import instantiate_from_config

    coder = {"ch": 32, "out_ch": 3, "in_channels": 3, "resolution": 8, "z_channels": 3, "num_res_blocks": 0}
    coder |= {"attn_resolutions": [], "double_z": False, "ch_mult": [1]}
    params = {"embed_dim": 3, "n_embed": 8, "lossconfig": {"target": "torch.nn.Identity"}}
    target = "ldm.models.autoencoder.VQModelInterface"
    assert instantiate_from_config({"target": target, "params": {**params, "ddconfig": coder}})
    for wrong, message in (({"ch": 1.5}, "ch must be a whole number"), ({"chmult": [1]}, "did you mean 'ch_mult'")):
        with pytest.raises(ValueError, match=message):
            instantiate_from_config({"target": target, "params": {**params, "ddconfig": {**coder, **wrong}}})
