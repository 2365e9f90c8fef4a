"""What answers at once imports little: `import ldm`, the list of commands and the help of each; no clock is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "pytorch_lightning", "omegaconf"}

IMPORT = """
import json, sys
before = set(sys.modules)
import ldm
print(json.dumps({"modules": sorted(set(sys.modules) - before), "version": ldm.__version__, "dir": dir(ldm)}))
"""

# The help of every command, in one process: by command and word its text, its exit code and what heavy it brought in.
HELP = """
import contextlib, io, json, sys
from ldm.commands.line import COMMANDS, load_command, overview, parse
found = {"": [overview(), 0, sorted(HEAVY & set(sys.modules))]}
for name in COMMANDS:
    for word in ("--help", "--help_all"):
        text, code = io.StringIO(), None
        with contextlib.redirect_stdout(text):
            try:
                parse(load_command(name), [word], f"decu {name}")
            except SystemExit as end:
                code = end.code
        found[f"{name} {word}"] = [text.getvalue(), code, sorted(HEAVY & set(sys.modules))]
print(json.dumps(found))
"""


def run(code, folder):
    """What a fresh interpreter prints as JSON, started in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_package_is_light(tmp_path):
    found = run(IMPORT, tmp_path)
    assert not HEAVY & {module.partition(".")[0] for module in found["modules"]}
    own = [module for module in found["modules"] if module.partition(".")[0] == "ldm"]
    # The ranges of values are checked where values are made; those of guidance have a module of their own.
    assert len(own) <= 8, own
    assert len(found["modules"]) <= 120, found["modules"]
    assert {"load_ensemble", "load_model", "load_posterior", "Sampling", "Branching", "Speed"} <= set(found["dir"])
    assert found["version"].split(".")[0].isdigit()


def test_help_of_every_command_is_light_and_leaves_no_default_open(tmp_path):
    helps = run(f"HEAVY = {HEAVY}\n{HELP}", tmp_path)
    assert len(helps) > 5
    assert {name: heavy for name, (_, _, heavy) in helps.items() if heavy} == {}
    assert {name: code for name, (_, code, _) in helps.items() if code != 0} == {}
    open_defaults = [name for name, (text, _, _) in helps.items() if "(default: None)" in " ".join(text.split())]
    assert not open_defaults, "say with option(default=...) what happens where the value is None"
    assert all(name.partition(" --")[0] in helps[""][0] for name in helps)
    assert all(
        len(helps[f"{name}_all"][0]) >= len(text) for name, (text, _, _) in helps.items() if name.endswith("--help")
    )
