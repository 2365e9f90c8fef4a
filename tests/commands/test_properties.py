"""Whatever words are given, a command acts or refuses them in one sentence: generated words, keys and values."""

import contextlib
import io
import shutil
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from omegaconf import OmegaConf

from ldm.commands.line import COMMANDS, _run, load_command, parse
from ldm.options import option_values
from ldm.ranges import OPTIONS, check_range
from ldm.settings import Branching, Sampling, Speed, Training
from ldm.training.config import load_config, merge_configs
from ldm.training.config_keys import SECTIONS, check_config
from ldm.util import instantiate_from_config
from tests.commands.test_failures import one_sentence

hypothesis = pytest.importorskip("hypothesis")
given, settings, strategies = hypothesis.given, hypothesis.settings, hypothesis.strategies
WRITTEN = Path(__file__).parents[1] / "fixtures" / "first_version"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BASE = "runs/2026-11-30T08-11-07_base"
DIGITS = "configs/latent-diffusion/digits.yaml"

# Options whose numbers are checked where more is known than a range, and those that any finite number fits.
CHECKED_BY_THEMSELVES = {
    "base_comp",  # against the members; -1 is DECU's
    "classes",
    "data_sd",  # together with --noise
    "distance_scale",
    "ema",
    "eps_scaler",  # the whole schedule is above 0
    "eps_slope",
    "k",
    "member_scales",  # of members
    "noise",
    "picture_classes",
    "pixel",  # against the picture
    "sampler_options",
}
ANY_NUMBER = {"classifier_scale", "logsnr", "scale", "steer"}
NUMBERS = ["0", "1", "2", "3", "-1", "-7", "0.5", "1.5", "nan", "inf", "-inf", "1e30", "99999999999999999999"]
WORDS = [
    "",
    "abc",
    "null",
    "true",
    "[1, 2]",
    "[]",
    "{}",
    "{a: 1}",
    "a.b",
    "all",
    "auto",
    "ml",
    "3,3",
    "ü",
    "../..",
    "0,",
]
wild = strategies.sampled_from(NUMBERS + WORDS)
# As many cases of a kind as are worth their time, and the same ones each time.
few, some, many = (
    settings(max_examples=count, deadline=None, derandomize=True, database=None) for count in (16, 60, 160)
)


def leaves(node, prefix=""):
    """The dotted keys of a plain config, sections and values."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


def number_options(kind):
    """The names of a command's options that are numbers, or lists of them."""
    for one in fields(kind):
        hint = get_type_hints(kind, include_extras=True)[one.name]
        inner, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_dataclass(inner):
            yield from number_options(inner)
        elif {int, float} & set(parts_of(inner)):
            yield next((note.name for note in notes if getattr(note, "name", None)), one.name)


def parts_of(hint):
    """A type and those within it."""
    yield hint
    for inner in get_args(hint):
        yield from parts_of(inner)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_range(name):
    """A new option says in `ldm.ranges` which numbers it takes, or here who checks them."""
    free = set(number_options(load_command(name))) - OPTIONS.keys() - CHECKED_BY_THEMSELVES - ANY_NUMBER
    assert not free


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("[a-z]*.py")))
def test_what_a_benchmark_takes_by_default_lies_in_the_ranges_of_its_options(name):
    """A name means one thing for all commands: those of benchmarks share its range."""
    module = import_module(f"benchmarks.{name}")
    kinds = [one for one in vars(module).values() if getattr(one, "__module__", "") == module.__name__]
    for kind in (one for one in kinds if is_dataclass(one) and hasattr(one, "run")):
        for one in fields(kind):
            check_range(one.name, one.default, OPTIONS, f"{name} --{one.name}")


@cache
def digits():
    """The config of digits, read once."""
    return load_config([DIGITS])


def change(word):
    """The config of digits with a word over it, checked as the words of a command are."""
    config = merge_configs(digits(), OmegaConf.from_dotlist([word]))
    check_config(config)
    return config


KEYS = sorted(leaves(OmegaConf.to_container(digits(), resolve=False)))


def misspell(word, place, how):
    """A word with a letter dropped, doubled, or exchanged for another."""
    place %= len(word)
    letter = {"drop": "", "double": 2 * word[place], "other": "q"}[how]
    return word[:place] + letter + word[place + 1 :]


@many
@given(strategies.sampled_from(KEYS), strategies.integers(0, 99), strategies.sampled_from(["drop", "double", "other"]))
def test_a_misspelt_key_of_a_config_is_refused_by_its_name(key, place, how):
    head, _, last = key.rpartition(".")
    wrong = misspell(last, place, how)
    word = f"{head}.{wrong}" if head else wrong
    try:
        change(f"{word}=1")
    except ValueError as error:
        assert one_sentence(str(error)) and wrong in str(error)
        return
    free = ("log_images_kwargs", "lightning.trainer")  # taken by functions and by Lightning, which refuse them later
    known = word in KEYS or not wrong or word in SECTIONS or any(part in word for part in free)
    assert known, f"{word} was taken"


@some
@given(strategies.sampled_from(KEYS), wild)
def test_a_value_of_a_config_acts_or_is_refused(key, value):
    word = f"{key}={value}"
    try:
        config = change(word)
        model = instantiate_from_config(config.model) if key.startswith("model.") else None
    except ValueError as error:
        assert one_sentence(str(error))
        return
    assert OmegaConf.select(config, key) == OmegaConf.select(OmegaConf.from_dotlist([word]), key)
    assert model is None or next(model.parameters()).isfinite().all()


@many
@given(strategies.sampled_from([Sampling, Branching, Speed, Training]), strategies.data())
def test_values_are_made_or_refused(kind, data):
    field = data.draw(strategies.sampled_from(sorted(kind.__dataclass_fields__)))
    number = data.draw(strategies.one_of(strategies.integers(), strategies.floats(), strategies.none()))
    more = {"base": ("x.yaml",)} if kind is Training else {}
    try:
        made = kind(**{**more, field: number})
    except ValueError as error:
        assert one_sentence(str(error))
    except (TypeError, AttributeError):
        hypothesis.assume(False)  # a type that no command line makes
    else:
        assert option_values(made)


def required(name):
    """Words for the options that a command cannot be without."""
    words = {"--path": "x", "--out": "o", "--run": "x", "--base": "x", "--ckpt": "x", "--posterior": "x", "--cut": "1"}
    words |= {"--ref": "x", "--samples": "x", "--flow": "x", "--flow_posterior": "x", "--probe": "x"}
    words |= {"--uncertainty": "x", "--indir": "x", "--outdir": "x", "--ensemble_name": "x"}
    known = set(load_command(name).__dataclass_fields__) | {"run"}
    return [part for option, value in words.items() if option[2:] in known for part in (option, value)]


@cache
def options_of(name):
    kind = load_command(name)
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        return sorted(option_values(parse(kind, required(name), "decu")))
    return sorted(kind.__dataclass_fields__)


@some
@given(strategies.sampled_from(sorted(COMMANDS)), strategies.data())
def test_options_are_read_or_refused(name, data):
    option = data.draw(strategies.sampled_from(options_of(name)))
    words = [*required(name), f"--{option}", data.draw(wild)]
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            made = parse(load_command(name), words, "decu")
        except SystemExit as end:
            assert end.code == 2 and "Traceback" not in error.getvalue() and error.getvalue().strip()
            return
    assert made is not None


CHOICES = {
    "--n": NUMBERS,
    "--n_per_class": NUMBERS,
    "--classes": [*NUMBERS, "3", "all", "abc"],
    "--steps": [*NUMBERS, "ddim3", "2,1", "abc", "3"],
    "--eta": NUMBERS,
    "--scale": NUMBERS,
    "--sampler": ["DDIM", "DDPM", "PLMS", "Heun", "DPM-Solver++", "Euler", "abc", "UniPC"],
    "--spacing": ["auto", "trailing", "published", "quad", "respace", "karras", "logsnr", "abc"],
    "--rho": NUMBERS,
    "--sigma_min": NUMBERS,
    "--sigma_max": NUMBERS,
    "--sampler_options": ["S_churn=1", "foo=1", "abc", "S_churn=nan", "temperature=0.5"],
    "--variance": ["fixed_small", "fixed_large", "learned_range"],
    "--eps_scaler": [*NUMBERS, "published"],
    "--eps_slope": NUMBERS,
    "--eps_unit": ["step", "log_snr"],
    "--seed": NUMBERS,
    "--batch_size": NUMBERS,
    "--chunk": NUMBERS,
    "--labels": ["random", "abc"],
    "--frames": NUMBERS,
    "--interpolate": ["1", "abc"],
    "--epoch": NUMBERS,
    "--ckpt": ["abc"],
    "--pretrained": ["abc"],
    "--device": ["cpu", "foo", "meta", "mps", ""],
}
pairs = strategies.sampled_from(sorted(CHOICES)).flatmap(
    lambda option: strategies.tuples(strategies.just(option), strategies.sampled_from(CHOICES[option]))
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    shutil.copytree(WRITTEN / BASE, folder / BASE)
    return folder


@few
@given(strategies.lists(pairs, min_size=1, max_size=3, unique_by=lambda pair: pair[0]), strategies.integers(0, 10**9))
def test_sampling_acts_or_is_refused(place, chosen, number):
    """In earnest, on the run of a small model; "failed with" is the sentence of what nobody thought of."""
    words = {
        "--run": str(place / BASE),
        "--out": str(place / str(number)),
        "--steps": "2",
        "--n": "2",
        "--device": "cpu",
    }
    words |= dict(chosen)
    if "--n_per_class" in words:
        del words["--n"]
    hypothesis.assume(words["--steps"] not in ("1e30",) and words.get("--n_per_class", "") not in ("1e30",))
    flat = [part for pair in words.items() for part in pair]
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            _run(load_command("sample model"), flat, "decu sample model")
        except SystemExit as end:
            message = error.getvalue() if end.code == 2 else str(end.code)
            assert end.code == 2 or one_sentence(message), message
            assert "failed with" not in message and "Traceback" not in message, (flat, message)
            return
    assert (Path(words["--out"]) / "samples.npz").exists()
