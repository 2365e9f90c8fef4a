"""The design's rules on small offending texts, since one that cannot fail is a defect, and then on the tree."""

import re

import pytest

from tests.architecture import (
    EXEMPT,
    FILE_LINES,
    MACHINE,
    RAISED_LIMITS,
    ROOT,
    RULES,
    TEXTS,
    TREE,
    circles,
    copies,
    name_clashes,
    near_limits,
    prose_share,
    source,
)

BRANCH, MODULE = "ldm/uncertainty/branch.py", "ldm/modules/attention.py"
OFFENCES = [
    ("imports_go_down", BRANCH, "from ldm.models.diffusion.ddpm import LatentDiffusion"),
    ("imports_go_down", BRANCH, "def f():\n    import ldm.evaluation.fid"),
    ("imports_go_down", BRANCH, "from ..models import autoencoder"),
    ("imports_go_down", "ldm/diffusion/schedule.py", "from ldm.models.diffusion import denoiser"),
    ("imports_go_down", "ldm/diffusion/schedule.py", "from ldm.ensembles.members import Members"),
    ("imports_go_down", "ldm/evaluation/fid.py", "from ldm.data.digits import Digits"),
    ("imports_go_down", "ldm/util.py", "from ldm.modules.ema import LitEma"),
    ("imports_go_down", "ldm/training/callbacks.py", "from main import ImageLogger"),
    ("imports_go_down", "ldm/helpers.py", "x = 1"),
    ("imports_go_down", "ldm/experiments/timing.py", "def f():\n    from benchmarks.growth import Growth"),
    ("imports_go_down", "ldm/commands/line.py", "import benchmarks"),
    ("imports_go_down", "benchmarks/x.py", "def f():\n    import main"),
    ("imports_go_down", "benchmarks/x.py", "from benchmarks.growth import Growth"),
    ("scripts_start_alone", "scripts/x.py", "import get_unc_synsets"),
    ("scripts_start_alone", "scripts/x.py", "from scripts.y import f"),
    ("modules_are_torch_only", MODULE, "import scipy.stats"),
    ("modules_are_torch_only", MODULE, "from ldm.jobs import claim"),
    ("lightning_stays_in_its_rooms", "ldm/laplace.py", "import pytorch_lightning as pl"),
    ("lightning_stays_in_its_rooms", "scripts/x.py", "from lightning.fabric import Fabric"),
    ("no_argparse_below_commands", BRANCH, "import argparse"),
    ("no_argparse_below_commands", BRANCH, "def f(options: argparse.Namespace): pass"),
    ("no_argparse_below_commands", BRANCH, "def f(options: Namespace): pass"),
    ("sizes", MODULE, "x = 1\n" * 301),
    ("sizes", MODULE, "def f():\n" + "    x = 1\n" * 60),
    ("sizes", MODULE, "class A:\n" + "    x = 1\n" * 250),
    ("no_commented_out_code", MODULE, "x = 1  # x = 2"),
    ("no_commented_out_code", MODULE, "# print(x)"),
    ("no_commented_out_code", MODULE, "# for x in range(3):"),
    ("no_forbidden_text", MODULE, "path = '/home/me'"),
    ("no_forbidden_text", MODULE, "x.cuda()"),
    ("no_forbidden_text", MODULE, "import pdb"),
    ("no_forbidden_text", MODULE, "np.random.default_rng(1)"),
    ("no_bare_except", MODULE, "try:\n    f()\nexcept:\n    pass"),
    ("one_torch_load", MODULE, "torch.load('a.ckpt')"),
    ("damage_is_named", BRANCH, "x = np.load(file)"),
    ("damage_is_named", BRANCH, "with open(file) as f:\n    x = json.load(f)"),
    ("damage_is_named", BRANCH, "try:\n    pass\nexcept ValueError:\n    x = json.loads(text)"),
    ("files_are_written_whole", BRANCH, "with atomic_write(file) as partial:\n    np.savez(partial, x=x)"),
    ("files_are_written_whole", BRANCH, "partial.write_text(x)"),
    ("files_are_written_whole", BRANCH, "with open(file) as partial:\n    partial.write_text(x)"),
    ("no_global_randomness", MODULE, "torch.manual_seed(1)"),
    ("no_global_randomness", "main.py", "pl.seed_everything(1)"),
    ("no_global_randomness", MODULE, "random.shuffle(x)"),
    ("no_global_randomness", MODULE, "torch.randn(3)"),
    ("no_global_randomness", MODULE, "torch.randn_like(x)"),
    ("no_global_randomness", MODULE, "f(x).normal_()"),
    ("no_global_randomness", MODULE, "x.uniform_(0, 1)"),
    ("no_mutable_defaults", MODULE, "def f(x=[]): pass"),
    ("no_mutable_defaults", MODULE, "def f(*, x=torch.zeros(1)): pass"),
    ("library_does_not_print", MODULE, "print(1)"),
]
INNOCENT = [
    ("no_argparse_below_commands", "ldm/commands/compvis.py", "import argparse"),
    ("imports_go_down", BRANCH, "from ldm.diffusion.samplers import Step\nfrom ldm.uncertainty import measures"),
    ("imports_go_down", "scripts/x.py", "from ldm.evaluation import fid\nimport main"),
    ("scripts_start_alone", "scripts/x.py", "def f():\n    import main"),
    ("imports_go_down", "benchmarks/x.py", "from ldm.commands.gather import Gather\nfrom ldm.report import tables"),
    ("imports_go_down", "ldm/report/plots.py", "from ldm.images import save_figure"),
    (
        "modules_are_torch_only",
        MODULE,
        "import math\nfrom torch import nn\nfrom ldm.util import instantiate_from_config",
    ),
    ("lightning_stays_in_its_rooms", "ldm/models/autoencoder.py", "import pytorch_lightning as pl"),
    ("sizes", MODULE, "def f():\n" + "    x = 1\n" * 59),
    ("no_commented_out_code", MODULE, "# Euler step.\nx = 1  # [B, C, H, W]\n# Note: x0\n# a sum, not a mean"),
    ("one_torch_load", "ldm/checkpoint.py", "torch.load('a.ckpt', weights_only=True)"),
    ("damage_is_named", BRANCH, "with reading(file, 'a list', 'mend it'), open(file) as f:\n    x = json.load(f)"),
    ("damage_is_named", BRANCH, "try:\n    x = np.load(file)\nexcept ValueError:\n    pass"),
    ("damage_is_named", BRANCH, "x = json.loads(json.dumps(y))"),
    ("files_are_written_whole", BRANCH, "with atomic_write(file) as partial:\n    partial.write_text(x)"),
    (
        "no_global_randomness",
        MODULE,
        "torch.randn(3, generator=g)\nnn.init.normal_(w)\ng = torch.Generator().manual_seed(1)",
    ),
    ("no_mutable_defaults", MODULE, "def f(x=(), y=None, z=1.0): pass"),
    ("library_does_not_print", "scripts/x.py", "print(1)"),
]


@pytest.mark.parametrize(("rule", "path", "text"), OFFENCES)
def test_rule_finds_the_offence(rule, path, text):
    assert list(RULES[rule](source(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), INNOCENT)
def test_rule_lets_the_innocent_pass(rule, path, text):
    assert not list(RULES[rule](source(path, text)))


def test_every_rule_has_an_offence():
    assert {rule for rule, _, _ in OFFENCES} == set(RULES)


def test_copies_are_found_under_other_names_and_docstrings():
    first = "def f(a):\n    'One.'\n" + "".join(f"    x{i} = a + {i}\n" for i in range(6))
    second = "def g(b):\n" + "".join(f"    y{i} = b + {i}\n" for i in range(6))
    other = second.replace("b + 5", "b - 5")
    short = "def h(a):\n    x = a\n    return x\ndef k(a):\n    x = a\n    return x\n"
    assert len(copies([source("ldm/a.py", first), source("ldm/b.py", second + short)])) == 1
    assert not copies([source("ldm/a.py", first), source("ldm/b.py", other + short)])


def test_a_name_of_two_modules_is_found_and_private_ones_are_not():
    first = "Sampler = object\nlog = 1\n_BLOCK = 2\ndef f():\n    g = 1\n"
    second = "class Sampler:\n    def f(self): pass\nlog = 1\n_BLOCK = 3\n"
    third = "from ldm.a import f\nx, Sampler = 1, 2\n"
    assert name_clashes([source("ldm/a.py", first), source("ldm/b.py", second)]) == {
        "Sampler": ["ldm/a.py:1", "ldm/b.py:1"]
    }
    assert list(name_clashes([source("ldm/a.py", first), source("ldm/c.py", third)])) == ["Sampler"]
    assert not name_clashes([source("ldm/a.py", first), source("scripts/b.py", second)])


@pytest.mark.parametrize("rule", RULES)
def test_tree_keeps_the_rule(rule):
    """The repository's own code, tests left out."""
    findings = [
        f"{file.path}:{found}" for file in TREE if (rule, file.path) not in EXEMPT for found in RULES[rule](file)
    ]
    assert not findings, "\n" + "\n".join(findings)


def test_tree_holds_no_copies():
    assert not copies(TREE), "\n" + "\n".join(" = ".join(where) for where in copies(TREE))


def test_no_public_name_is_defined_twice():
    """One name means one thing in `ldm`: a second definition takes another name, an underscore, or an import."""
    clashes = name_clashes(TREE)
    found = "\n".join(f"{name}: {' '.join(where)}" for name, where in clashes.items())
    assert not clashes, f"\n{found}"


def test_circles_are_found_where_they_hide():
    hidden = "if TYPE_CHECKING:\n    from ldm.a import f"
    late = "def g():\n    import ldm.b"
    files = [source("ldm/a.py", late), source("ldm/b.py", hidden), source("ldm/c.py", "from ldm import a")]
    assert circles(files) == ["ldm.a", "ldm.b"]
    assert not circles([files[1], files[2], source("ldm/a.py", "import torch")])


def test_no_module_imports_itself_by_way_of_others():
    assert not circles(TREE)


def test_a_fifth_of_the_lines_is_prose():
    """Comments and docstrings, which the best code bases give a fifth to two fifths of their lines."""
    halves = [source("a.py", "x = 1  # a reason\n"), source("b.py", "x = 1\n")]
    assert prose_share(halves) == 0.5
    assert prose_share([file for file in TREE if file.path.startswith("ldm/")]) >= 0.2


def test_what_is_near_its_limit_is_named(capsys):
    """The limits warn at nine tenths: `pytest -rP tests/test_architecture.py` prints the list."""
    assert list(near_limits(source("x.py", "x = 1\n" * 271))) == ["x.py: 271 lines of 300"]
    assert len(list(near_limits(source("x.py", "def f():\n" + "    x = 1\n" * 54)))) == 1
    print(*(line for file in TREE for line in near_limits(file)), sep="\n")


def test_texts_name_no_machine():
    """Configs, documents and shell scripts mention no path of one machine."""
    findings = [
        f"{path.relative_to(ROOT)}: {found[0]}" for path in TEXTS for found in re.finditer(MACHINE, path.read_text())
    ]
    assert not findings, "\n".join(findings)


def test_exceptions_are_needed():
    """A raised limit or an exemption whose reason has gone is removed."""
    files = {file.path: file for file in TREE}
    assert all(files[path].text.count("\n") > FILE_LINES for path in RAISED_LIMITS)
    assert all(list(RULES[rule](files[path])) for rule, path in EXEMPT)
