"""From words to a command: older spellings, shared groups of the help, and how errors end the process."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

from ldm import __version__
from ldm.commands.line import COMMANDS, load_command, main, overview, parse, run_command
from ldm.commands.words import collapse
from ldm.options import WITH_VALUE

CLASSES = "uncertainty classes"


def parsed(*words):
    return parse(load_command(CLASSES), ["--path", "an ensemble", *words], "decu")


def test_published_spellings_are_those_of_the_fields():
    published = parsed("--ddim_steps", "7", "--ddim_eta", "0.5", "--unc_branch", "0", "3", "--base_comp", "-1")
    assert (published.sampling.steps, published.sampling.eta) == (7, 0.5)
    assert published.branching.step == (0, 3) and published.branching.base == (-1,)
    ours = parsed("--steps", "7", "--eta", "0.5", "--unc_branch", "0", "3", "--base_comp", "-1")
    assert ours == published


@pytest.mark.parametrize(
    ("words", "clip"),
    [
        ([], None),
        (["--clip_denoised"], True),
        (["--clip_denoised", "False"], False),
        (["--no-clip_denoised"], False),
    ],
)
def test_a_switch_of_three_states(words, clip):
    assert parsed(*words).sampling.clip is clip


def test_a_second_name_of_a_sampler():
    assert parsed("--sampler", "dpmpp_2m").sampling.sampler == "DPM-Solver++"


# The last names no class.
BAD_WORDS = [["--unc_branch", "1", "--branch_at", "0.5"], ["--stepz", "3"], ["--steps", "3x"], ["--classes"]]


@pytest.mark.parametrize("words", BAD_WORDS)
def test_words_that_do_not_fit_end_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*words)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--steer", "1", "--steer_by", "edge"],
            "expected one of disagreement, edges, random; got 'edge'; did you mean 'edges'?",
        ),
        (["--eps_unit", "steps"], "expected one of step, log_snr; got 'steps'; did you mean 'step'?"),
        (["--steer_steps", "much"], "could not convert string to float: 'much'"),
        (["--data_sd", "3x"], "could not convert string to float: '3x'"),
    ],
)
def test_a_word_is_not_answered_with_what_no_word_means(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*words)
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and said in err and "None" not in err


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("sample model", ["--n", "abc"], "--n takes N: invalid literal for int() with base 10: 'abc'"),
        ("sample model", ["--batch_size", "nan"], "--batch_size takes N|auto: got nan"),
        ("sample model", ["--eps_window", "nan"], "--eps_window takes LOW HIGH: got nan"),
        ("sample model", ["--chunk", ""], "--chunk takes N|auto: got nothing"),
        ("train", ["--seed", "x"], "--seed takes N: invalid literal"),
    ],
)
def test_a_value_that_cannot_be_read_is_one_sentence(name, words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(name, [*words, "--out" if name != "train" else "--name", "o"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"error: {said}") and err.endswith(f"see decu {name} --help\n")


def test_what_is_left_out_may_be_written_as_none():
    assert parsed("--steer", "1", "--steer_by", "None", "--steer_steps", "None") == parsed("--steer", "1")


def switches(kind):
    """(class, field) of every switch of a command, and of its values, that is on where nothing is said."""
    for field in fields(kind):
        own = get_type_hints(kind, include_extras=True)[field.name]
        plain, notes = (get_args(own)[0], get_args(own)[1:]) if get_origin(own) is Annotated else (own, ())
        if is_dataclass(plain):
            yield from switches(plain)
        elif plain is bool and field.default is True and WITH_VALUE not in notes:
            yield kind, field.name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_switch_that_is_on_says_what_turning_it_off_does(name):
    for kind, field in switches(load_command(name)):
        written = re.search(rf'^    {field}: ([^\n]*) = True\n    """(.*?)"""', inspect.getsource(kind), re.M | re.S)
        assert written and "default=" in written[1], f"{field}: its help says (default: True) of --no_{field}"
        assert re.search(rf"; --no[-_]{field} \w+", written[2]), f"{field}: say what --no_{field} does"


REFUSED = [
    (
        ["--steps", "0"],
        "error: expected a number of steps, or a respacing such as ",
    ),
    (["--no_stat", "2"], None),
    (["--eta", "2"], "error: --eta"),
    (["--unc_branch", "1", "--branch_at", "0.5"], "error: "),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_a_value_refuses_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*words)
    lines = capsys.readouterr().err
    assert stop.value.code == 2
    if said is None:
        assert "Unrecognized" in lines and "error: " not in lines
    else:
        assert lines.startswith(said) and lines.count("\n") == 1


def test_errors_of_a_run_end_with_their_sentence_and_code_1(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .* holds no ensemble\.yaml"):
        run_command(CLASSES, ["--path", str(tmp_path)])


def test_help_names_shared_options_and_help_all_explains_them(capsys):
    texts = {}
    for word in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            parsed(word)
        assert stop.value.code == 0
        texts[word] = capsys.readouterr().out
    assert "--eps_scaler" in texts["--help"] and "The divisor b" not in texts["--help"]
    assert "The divisor b" in texts["--help_all"]
    for name in ("--path", "--n", "--unc_branch", "--distance", "--keep_images"):
        assert name in texts["--help"]


def test_a_group_is_collapsed_in_either_form_of_the_help():
    boxed = "╭─ options ─╮\n│ --own X    │\n╰─────╯\n╭─ speed options ─╮\n│ --chunk N    what │\n╰─────╯\n"
    plain = " options\n -----\n  --own X\n\n speed options\n ------\n  Words.\n\n  --chunk N    what\n"
    for text in (boxed, plain):
        short = collapse(text)
        assert "--own X" in short and "what" not in short
        assert short.endswith("  speed: --chunk\n")


def test_what_is_no_command_is_answered_with_the_list(capsys):
    with pytest.raises(SystemExit, match="no command 'uncertainty clases'"):
        main(["uncertainty", "clases"])
    listed = capsys.readouterr().out
    assert "uncertainty pixels" in listed and "gather" not in listed
    assert "gather" in overview()


def test_the_command_knows_its_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"decu {__version__}\n"


def test_interrupts_and_faults_of_ours_end_a_command_without_a_traceback(monkeypatch, capsys):
    def run_raising(error):
        def run(_):
            raise error

        monkeypatch.setattr(load_command(CLASSES), "run", run)
        return run_command(CLASSES, ["--path", "an ensemble"])

    with pytest.raises(SystemExit) as stop:
        run_raising(KeyboardInterrupt())
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    with pytest.raises(SystemExit, match="KeyError: 'a fault of ours'; --debug shows where"):
        run_raising(KeyError("a fault of ours"))


def test_a_reader_that_leaves_early_sees_no_traceback():
    """`decu --help | head`: the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "from ldm.commands import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
