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
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

CONFIG = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
CHECKPOINT = "models/ldm/text2img-large/model.ckpt"
PROMPT = "a painting of a virus monster playing guitar"
# Steps, guidance scale and seed of latent-diffusion's script, and those of Stable Diffusion's, which takes --config.
WITHOUT_CONFIG = (200, 5.0, 0)
WITH_CONFIG = (50, 7.5, 42)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--from-file", "--from_file", "--prompts", dest="prompts")
    parser.add_argument("--outdir", default="outputs/txt2img-samples")
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
    return parser


def translate_txt2img(words: Sequence[str]) -> list[str]:
    """Return the words of `decu sample model` for those of txt2img.py; words that it does not know are kept.

    Raises:
        ValueError: for --plms with an eta.
    """
    given, rest = _make_parser().parse_known_args(list(words))
    steps, scale, seed = WITHOUT_CONFIG if given.config is None else WITH_CONFIG
    if given.plms and given.ddim_eta:
        raise ValueError(f"--plms samples without noise: leave out --ddim_eta {given.ddim_eta:g}")
    config = given.config or CONFIG
    prompts = given.prompt or ([] if given.prompts else [PROMPT])
    options: dict[str, object] = {
        "--base": config,
        "--ckpt": given.ckpt,
        "--prompts": given.prompts,
        "--n_per_class": given.n_iter * given.n_samples,
        "--batch_size": given.n_samples,
        "--sampler": "PLMS" if given.plms else None,
        "--steps": given.ddim_steps or steps,
        "--spacing": "published",
        "--eta": None if given.plms else given.ddim_eta,
        "--scale": scale if given.scale is None else given.scale,
        "--seed": seed if given.seed is None else given.seed,
        "--out": given.outdir,
    }
    found = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    size = _find_size(config, given.H, given.W)
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    return [*found, *size, *asked, "--pngs", *rest]


def _find_size(config: str, height: int | None, width: int | None) -> list[str]:
    """Return the words of another size than the config's, in pixels; none where it is the config's."""
    from ldm.training.config import load_config
    from ldm.util import read_image_size

    if height is None and width is None:
        return []
    params = load_config([config]).model.params
    levels = len(params.first_stage_config.get("params", {}).get("ddconfig", {}).get("ch_mult", [1]))
    high, wide = (side * 2 ** (levels - 1) for side in read_image_size(params.image_size))
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
