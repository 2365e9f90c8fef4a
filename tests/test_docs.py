"""Command lines in README.md, CONTRIBUTING.md and docs/ are understood by the commands that they name."""

import re
import shlex
from pathlib import Path

import pytest

from ldm.commands.compvis import translate_words
from ldm.commands.line import COMMANDS, load_command, parse

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
DOORS = {
    "main.py": "train",
    "save_ensemble.py": "gather",
    "sample_model.py": "sample members",
    "sample_model_rollout.py": "rollout",
    "get_unc_synsets.py": "uncertainty classes",
    "get_unc_pixels.py": "uncertainty pixels",
    "scripts/sample_diffusion.py": "sample model",
}
# What starts a process of ours in a job: torchrun and srun with their own options.
STARTERS = re.compile(r"^(?:srun|torchrun) .*?(?=python |-m -- ldm |-- \S+\.py)")


def code_lines(text):
    """The lines of fenced and indented code, continued ones joined, empty ones left out."""
    fenced = re.findall(r"^```(?:bash|sh|)\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^ {4,}(\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    joined = re.sub(r"\\\n\s*", "", "\n".join([*indented, *fenced]))
    return list(filter(None, joined.splitlines()))


def split_command(line):
    """Return (command, words) of a line that calls a command, else None."""
    line = STARTERS.sub("", line)
    line = re.sub(r"^-- (?=\S+\.py)", "python ", line.replace("-m -- ldm ", "python -m ldm ", 1))
    if not line.startswith(("decu ", "python ")):
        return None
    head, *rest = line.split(maxsplit=2)
    if head == "python" and rest[0] in DOORS:
        return DOORS[rest[0]], shlex.split(rest[1], comments=True)
    if head == "python" and not line.startswith("python -m ldm "):
        return None
    words = shlex.split(line.removeprefix("python -m ldm").removeprefix("decu"), comments=True)
    name = next((name for count in (2, 1) if (name := " ".join(words[:count])) in COMMANDS), None)
    assert name, f"there is no command in: {line}"
    return name, words[len(name.split()) :]


def read_calls(page):
    """Return (line, command, words) of every call of a command in a page."""
    found = [(line, split_command(line)) for line in code_lines((ROOT / page).read_text())]
    return [(line, *call) for line, call in found if call is not None]


def check_call(line, name, words):
    """Fail unless the words make the command."""
    try:
        words = translate_words(words) if "scripts/sample_diffusion.py" in line else words
        parse(load_command(name), words, name)
    except (SystemExit, ValueError) as error:
        pytest.fail(f"{line}\nis not understood: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_of_a_page_are_understood(page, capsys):
    for line, name, words in read_calls(page):
        check_call(line, name, words)


def test_calls_are_found_in_fenced_and_indented_code():
    indented = "text\n\n    decu gather --path logs \\\n        --ensemble_comps 5   # five\n"
    fenced = "```bash\nsrun -n 2 python get_unc_synsets.py --path E\n```\n"
    assert [split_command(line) for line in code_lines(f"{indented}\n{fenced}")] == [
        ("gather", ["--path", "logs", "--ensemble_comps", "5"]),
        ("uncertainty classes", ["--path", "E"]),
    ]


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("torchrun --nproc_per_node 4 -m -- ldm sample model --run R", ("sample model", ["--run", "R"])),
        ("torchrun --nproc_per_node 4 -- get_unc_pixels.py --path E", ("uncertainty pixels", ["--path", "E"])),
        ("ls logs", None),
        ("python -c 'pass'", None),
    ],
)
def test_a_line_names_its_command(line, call):
    assert split_command(line) == call


@pytest.mark.parametrize("words", [["--n", "many"], ["--no_such_option", "1"]])
def test_a_wrong_line_is_noticed(words):
    with pytest.raises(pytest.fail.Exception, match="is not understood"):
        check_call("decu uncertainty classes", "uncertainty classes", ["--path", "E", *words])


SCRIPT = re.sub(r"\\\n +", "", (ROOT / "scripts/assets.sh").read_text())


def script_lines():
    """The calls of `decu` in the script of pictures, its helper `fit` written out and its variables set."""
    calls = re.findall(r"(?:^ +|\|\| )(decu .*)$", SCRIPT, re.M)
    fits = re.findall(r"^ +fit (\"\$\(.*?\)\") (\w+) (.*)$", SCRIPT, re.M)
    calls += [f"decu laplace fit --run {run} --out {name} {options}" for run, name, options in fits]
    return [call.replace('"$@"', "").replace("--base  -t", "--base CONFIG -t").replace('"$5"', "5") for call in calls]


def test_every_picture_is_drawn_by_one_group_of_the_script():
    table = re.search(r'^groups="\n(.*?)^"', SCRIPT, re.M | re.S)[1]
    rows = [re.split(r" {2,}", line) for line in table.splitlines()]
    drawn = {}
    for group, body in re.findall(r"^draw_(\w+)\(\) \{\n(.*?)^\}", SCRIPT, re.M | re.S):
        drawn[group] = re.findall(r"^ +take .*[\"*)] (\w+)(?: #.*)?$", body, re.M)
    assert {group: sorted(names.split()) for group, names, *_ in rows} == {
        group: sorted(names) for group, names in drawn.items()
    }
    every = sorted(name for names in drawn.values() for name in names)
    assert every == sorted(path.stem for path in (ROOT / "assets").glob("*.png")), "each picture once"
    assert all((ROOT / name).exists() for name in re.findall(r"(?:configs|scripts|benchmarks)/[\w/.-]+\.\w+", SCRIPT))


def test_command_lines_of_the_script_of_pictures_are_understood(capsys):
    lines = script_lines()
    assert len(lines) > 30
    for line in lines:
        check_call(line, *split_command(line.replace('"$scale"', "1").replace('"$seed"', "1")))
