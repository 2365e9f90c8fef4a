"""What is installed: imports are declared dependencies; the wheel holds the library, its configs and the command."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAME = "decu-uncertainty"
# Where the module has not the name of its distribution.
DISTRIBUTIONS = {
    "curvlinops": "curvlinops-for-pytorch",
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "pytorch_lightning": "pytorch-lightning",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
    "yaml": "pyyaml",
}
# Taken where they are and done without where they are not: no extra of the package installs them.
OPTIONAL = {"taming"}


def declared(pattern):
    """The distributions of a list of pyproject.toml, which is matched from its name."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(rf"^{pattern} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    return {name for found in lists for name in re.findall(r'"([A-Za-z][A-Za-z0-9-]*)', found)}


def third_party(file):
    """The distributions that a file imports when it runs: imports for type checkers are left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        for top in {name.partition(".")[0] for name in names}:
            if top not in {"ldm", *OPTIONAL, *sys.stdlib_module_names}:
                yield DISTRIBUTIONS.get(top, top)


def test_dependencies_are_what_the_library_imports():
    imported = {name for file in (ROOT / "ldm").rglob("*.py") for name in third_party(file)}
    always = declared("dependencies")
    extras = declared("(?:metrics|lsun|clip|wandb|diffusers|laplace)")
    assert len(imported) > 10
    assert imported <= always | extras, imported - always - extras
    # Lightning writes TensorBoard's files with it.
    assert always - imported == {"tensorboard"}


def test_requirements_are_the_package_and_messages_know_its_name():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["-e ."]
    texts = {path: path.read_text() for path in [*ROOT.glob("*.md"), *(ROOT / "ldm").rglob("*.py")]}
    wrong = [str(path) for path, text in texts.items() if re.search(r"pip install ['\"]?(decu\[|\.\[|decu$)", text)]
    assert not wrong


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of the repository, since a build leaves files beside the sources."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools: pip install setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("ldm", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "main.py"):
        shutil.copy(ROOT / name, folder)
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    (folder / "dist").mkdir()
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_library_its_configs_and_the_command(wheel):
    version = re.search(r'^__version__ = "(.*)"$', (ROOT / "ldm" / "__init__.py").read_text(), re.MULTILINE)[1]
    info = f"{NAME.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith(info)}
        entries = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    files = [path for ending in ("*.py", "*.j2") for path in (ROOT / "ldm").rglob(ending)]
    own = {path.relative_to(ROOT).as_posix() for path in files}
    configs = {f"ldm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert held == own | configs | {"ldm/py.typed"}
    assert "decu = ldm.commands:main" in entries
    assert f"Name: {NAME}" in metadata
    assert f"Version: {version}" in metadata


@pytest.mark.slow
def test_an_installed_package_knows_its_configs_in_any_folder(wheel, tmp_path):
    """Unpacked, and away from the repository: with no main.py and no configs/ beside it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = (
        f"import sys; sys.path = [{str(tmp_path / 'site')!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
        "from ldm.training.config import find_config, load_config\n"
        "from ldm.util import instantiate_from_config\n"
        "from ldm.records import revision\n"
        "config = load_config(['configs/latent-diffusion/digits.yaml'])\n"
        "print(find_config('configs/latent-diffusion/digits.yaml'))\n"
        "print(type(instantiate_from_config(config.data)).__module__)\n"
        "print(revision())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "empty", env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, module, revision = done.stdout.splitlines()
    assert path == str(tmp_path / "site/ldm/configs/latent-diffusion/digits.yaml")
    assert module == "ldm.data.module"
    assert revision.startswith(NAME)
