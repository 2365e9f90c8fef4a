"""latent-diffusion's and Stable Diffusion's scripts/txt2img.py in our words.

| theirs | ours |
| --- | --- |
| --prompt TEXT, --from-file FILE | --prompt, --prompts |
| --outdir DIR (outputs/txt2img-samples) | --out, and --pngs |
| --ddim_steps (200; with --config 50) | --steps on CompVis' times (--spacing published) |
| --plms, --ddim_eta (0) | --sampler PLMS, --eta |
| --n_iter (1) times --n_samples (4) | --n_per_class, in batches of --n_samples |
| --H, --W | --size, where it is not the config's |
| --scale (5; with --config 7.5) | --scale |
| --config, --ckpt (those of txt2img-1p4B) | --base, --ckpt |
| --seed (0; with --config 42) | --seed |
| --dpm_solver | --sampler DPM-Solver++ |
| --skip_save | no --pngs |
| --precision full, autocast | --precision float32, fp16 |
| --laion400m | CONFIG and CHECKPOINT of latent-diffusion, into outputs/txt2img-samples-laion400m |
| --C, --f | nothing: the config has them, and others are refused |
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
CHECKPOINT = "models/ldm/text2img-large/model.ckpt"
OUTDIR, LAION = "outputs/txt2img-samples", "-laion400m"
PROMPT = "a painting of a virus monster playing guitar"
# Steps, guidance scale and seed of latent-diffusion's script, and those of Stable Diffusion's, which takes --config.
WITHOUT_CONFIG = (200, 5.0, 0)
WITH_CONFIG = (50, 7.5, 42)
# Options of Stable Diffusion's script with nothing for them here, and why.
WITHOUT_COUNTERPART = {
    "skip_grid": "grid.png is always written",
    "n_rows": "grid.png has a row a prompt",
    "fixed_code": "image i has a noise of its own; in Python the latents of one are repeated",
}
THEIR_PRECISIONS = {"full": "float32", "autocast": "fp16"}


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--from-file", "--from_file", "--prompts", dest="prompts")
    parser.add_argument("--outdir")
    parser.add_argument("--ddim_steps", type=int)
    parser.add_argument("--plms", action="store_true")
    parser.add_argument("--ddim_eta", type=float, default=0.0)
    parser.add_argument("--n_iter", type=int, default=1)
    parser.add_argument("--n_samples", type=int, default=4)
    parser.add_argument("--H", type=int)
    parser.add_argument("--W", type=int)
    parser.add_argument("--scale", type=float)
    parser.add_argument("--config")
    parser.add_argument("--ckpt", default=CHECKPOINT)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--dpm_solver", action="store_true")
    parser.add_argument("--skip_save", action="store_true")
    parser.add_argument("--laion400m", action="store_true")
    parser.add_argument("--precision")
    parser.add_argument("--C", type=int)
    parser.add_argument("--f", type=int)
    for name in WITHOUT_COUNTERPART:
        parser.add_argument(f"--{name}", nargs="?", const=True)
    return parser


def translate_txt2img(words: Sequence[str]) -> list[str]:
    """Return the words of `decu sample model` for those of txt2img.py; words that it does not know are kept.

    Raises:
        ValueError: for --plms or --dpm_solver with an eta or with each other, for another shape of latents than the
            config's, and for options of Stable Diffusion's script with nothing for them here.
    """
    given, rest = _make_parser().parse_known_args(list(words))
    steps, scale, seed = WITHOUT_CONFIG if given.config is None else WITH_CONFIG
    config = given.config or CONFIG
    _check_given(given, config)
    if given.dpm_solver or given.plms:
        sampler = "PLMS" if given.plms else "DPM-Solver++"
    else:
        sampler = None
    prompts = given.prompt or ([] if given.prompts else [PROMPT])
    options: dict[str, object] = {
        "--base": config,
        "--ckpt": given.ckpt,
        "--prompts": given.prompts,
        "--n_per_class": given.n_iter * given.n_samples,
        "--batch_size": given.n_samples,
        "--sampler": sampler,
        "--steps": given.ddim_steps or steps,
        "--spacing": "published",
        "--eta": given.ddim_eta if sampler is None else None,
        "--scale": scale if given.scale is None else given.scale,
        "--seed": seed if given.seed is None else given.seed,
        "--precision": THEIR_PRECISIONS.get(given.precision, given.precision),
        "--out": given.outdir or (OUTDIR + LAION * given.laion400m),
    }
    found = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    size = _find_size(config, given.H, given.W)
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    pngs = [] if given.skip_save else ["--pngs"]
    return [*found, *size, *asked, *pngs, *rest]


def _check_given(given: argparse.Namespace, config: str) -> None:
    """Refuse what would not act.

    Raises:
        ValueError: see `translate_txt2img`.
    """
    for name, reason in WITHOUT_COUNTERPART.items():
        if getattr(given, name) is not None:
            raise ValueError(f"--{name} has no effect here, since {reason}: leave it out")
    if given.laion400m and given.config is not None:
        raise ValueError(f"--laion400m takes {CONFIG}: leave out --config {given.config}")
    if given.plms and given.dpm_solver:
        raise ValueError("--plms and --dpm_solver are two samplers: leave one out")
    if given.ddim_eta and (given.plms or given.dpm_solver):
        name = "plms" if given.plms else "dpm_solver"
        raise ValueError(f"--{name} samples without noise: leave out --ddim_eta {given.ddim_eta:g}")
    if given.C is None and given.f is None:
        return
    from ldm.training.config import load_config

    params = load_config([config]).model.params
    known = (params.channels, _find_factor(params))
    asked = (given.C or known[0], given.f or known[1])
    if asked != known:
        raise ValueError(
            f"--C and --f are the latents' channels and the first stage's factor, {known[0]} and {known[1]} in "
            f"{config}: leave them out, got {asked[0]} and {asked[1]}"
        )


def _find_factor(params: Any) -> int:
    """Return by how much the first stage of a model's parameters makes a side smaller."""
    levels = params.first_stage_config.get("params", {}).get("ddconfig", {}).get("ch_mult", [1])
    return 2 ** (len(levels) - 1)


def _find_size(config: str, height: int | None, width: int | None) -> list[str]:
    """Return the words of another size than the config's, in pixels; none where it is the config's."""
    from ldm.training.config import load_config
    from ldm.util import read_image_size

    if height is None and width is None:
        return []
    params = load_config([config]).model.params
    high, wide = (side * _find_factor(params) for side in read_image_size(params.image_size))
    size = (height or high, width or wide)
    return [] if size == (high, wide) else ["--size", *map(str, size)]


def run_txt2img() -> None:
    """Run scripts/txt2img.py from the words of this process."""
    from ldm.commands.line import run_command

    words = sys.argv[1:]
    if not {"-h", "--help", "--help_all"} & set(words):
        try:
            words = translate_txt2img(words)
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
    run_command("sample model", words, Path(sys.argv[0]).name)
