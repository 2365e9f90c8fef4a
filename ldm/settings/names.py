"""Names of samplers and of spacings that a command line takes, without torch; docs/samplers.md describes each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

SamplerName = Literal[
    "DDIM",
    "DDPM",
    "PLMS",
    "DPM-Solver++",
    "DPM-Solver-2",
    "DPM-Solver-3",
    "DPM-Solver-fast",
    "DPM-Solver-adaptive",
    "DPM-Solver++2S-ancestral",
    "DPM-Solver++SDE",
    "DPM-Solver++2M-SDE",
    "DPM-Solver++3M-SDE",
    "DPM-2-ancestral",
    "Euler-ancestral",
    "LMS",
    "Heun",
    "Euler",
    "Midpoint",
    "RK4",
    "Euler-time",
    "Heun-time",
    "Dopri5",
]
# k-diffusion's names of the same samplers.
SecondName = Literal[
    "euler",
    "heun",
    "lms",
    "dpm_2",
    "dpm_fast",
    "dpm_adaptive",
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_2m",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
]
SECOND_NAMES: dict[str, SamplerName] = {
    "euler": "Euler",
    "heun": "Heun",
    "lms": "LMS",
    "dpm_2": "DPM-Solver-2",
    "dpm_fast": "DPM-Solver-fast",
    "dpm_adaptive": "DPM-Solver-adaptive",
    "euler_ancestral": "Euler-ancestral",
    "dpm_2_ancestral": "DPM-2-ancestral",
    "dpmpp_2s_ancestral": "DPM-Solver++2S-ancestral",
    "dpmpp_2m": "DPM-Solver++",
    "dpmpp_sde": "DPM-Solver++SDE",
    "dpmpp_2m_sde": "DPM-Solver++2M-SDE",
    "dpmpp_3m_sde": "DPM-Solver++3M-SDE",
}

Spacing = Literal[
    "auto",
    "trailing",
    "trailing_first",
    "published",
    "leading",
    "leading_first",
    "leading_offset",
    "leading_offset_clean",
    "quad",
    "respace",
    "karras",
    "exponential",
    "polyexponential",
    "vp",
    "logsnr",
    "time_uniform",
    "time_quadratic",
]
# BayesDiff's name of a spacing.
SecondSpacing = Literal["logSNR"]
SECOND_SPACINGS: dict[str, Spacing] = {"logSNR": "logsnr"}

# Samplers that choose their steps by the state.
ADAPTIVE: tuple[SamplerName, ...] = ("DPM-Solver-adaptive", "Dopri5")

SAMPLER_NAMES: tuple[str, ...] = (*get_args(SamplerName), *get_args(SecondName))
SPACING_NAMES: tuple[str, ...] = (*get_args(Spacing), *get_args(SecondSpacing))


def suggest(word: str, known: Iterable[str]) -> str:
    """Return words that name the known one nearest to a wrong word, or nothing where none is near."""
    folded = {one.lower(): one for one in known}
    nearest = difflib.get_close_matches(word.lower(), folded, n=1)
    return f"; did you mean '{folded[nearest[0]]}'?" if nearest else ""


def choose_name(words: Sequence[str], known: Sequence[str]) -> str:
    """Return the one word that an option was given.

    Raises:
        ValueError: if it is none of the known ones, naming the nearest.
    """
    (word,) = words
    if word not in known:
        raise ValueError(f"expected one of {', '.join(known)}; got '{word}'{suggest(word, known)}")
    return word
