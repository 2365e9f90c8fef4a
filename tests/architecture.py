"""The rules of the design that a machine can check: import direction, sizes, dead code, randomness, copies.

Stdlib only. Each rule is a function of a `Source` that yields findings "line: what is wrong"; `test_architecture.py`
tries them on small texts and on the tree.
"""

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FILE_LINES, FUNCTION_LINES, CLASS_LINES = 300, 60, 250
# Path -> (limit, reason) for files that may be longer than FILE_LINES.
RAISED_LIMITS: dict[str, tuple[int, str]] = {}
# (rule, path) -> reason.
EXEMPT: dict[tuple[str, str], str] = {
    (
        "modules_are_torch_only",
        "ldm/modules/encoders/tokenizers.py",
    ): "tokenizers of transformers, where texts are read",
    ("no_global_randomness", "ldm/training/callbacks.py"): "dropout draws from torch's own generator; seeded a step",
    ("no_global_randomness", "ldm/training/session.py"): "torch initialises parameters from its generator, by --seed",
    ("no_global_randomness", "ldm/experiments/noisy_classifiers.py"): "the same, for a network trained from scratch",
    ("damage_is_named", "ldm/data/decoding.py"): "of bytes alone; `read_named` names the picture",
    ("damage_is_named", "ldm/data/lists.py"): "of a text alone; `read_rows` names the list",
    ("files_are_written_whole", "ldm/training/lock.py"): "a lock is linked to its name once it is written",
    (
        "no_global_randomness",
        "ldm/pipelines/features.py",
    ): "the same, for an untrained network; the state is put back after",
}

# What reads a file, and knows nothing of it where it is damaged.
READERS = {"np.load", "json.load", "json.loads", "yaml.safe_load", "OmegaConf.load", "safe_open", "Image.open"}

# What writes a file in place, which a full disk or a kill leaves half written.
WRITERS = {"write_text", "write_bytes", "savefig"}
ARRAY_WRITERS = {"np.savez", "np.savez_compressed"}

# Public names that several modules of `ldm` may define.
SHARED_NAMES = {"log"}

# Longest prefix -> level. An import goes to a lower level, or stays in its room: the package named here.
LEVELS = {
    "ldm": 0,
    "ldm.modules": 1,
    "ldm.diffusion": 2,
    "ldm.ensembles": 3,
    "ldm.uncertainty": 4.1,
    "ldm.laplace": 4,
    "ldm.evaluation": 4.2,
    "ldm.models": 5,
    "ldm.data": 6,
    "ldm.training": 7,
    "ldm.interop": 7.5,  # builds our models from other libraries' folders, which pipelines load
    "ldm.pipelines": 8,
    "ldm.experiments": 9,
    "ldm.benchmark": 9.2,  # methods side by side: asks experiments, and reports show it
    "ldm.report": 9.5,
    "ldm.commands": 10,
    "benchmarks": 10.5,
}
BASE = {
    "ldm",
    "ldm.util",
    "ldm.checkpoint",
    "ldm.file_kinds",
    "ldm.jobs",
    "ldm.lr_scheduler",
    "ldm.memory",
    "ldm.partials",
    "ldm.pickles",
    "ldm.images",
    "ldm.records",
    "ldm.settings",
    "ldm.settings.guidance",
    "ldm.settings.names",
    "ldm.settings.sampling",
    "ldm.settings.training",
    "ldm.options",
    "ldm.state_dicts",
    "ldm.arguments",
    "ldm.files",
    "ldm.fonts",
    "ldm.ranges",
    "ldm.stats",
    "ldm.trust",
    "ldm.wording",
}
# What leads to all rooms, and is imported by none.
DOORS = ("ldm/__init__.py", "ldm/__main__.py")
MODULES_MAY_IMPORT = {"torch", "numpy", "einops", *sys.stdlib_module_names}
# ldm.memory is of torch alone, ldm.state_dicts of names alone.
MODULES_BASE = ("ldm.modules", "ldm.util", "ldm.checkpoint", "ldm.memory", "ldm.state_dicts")
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
LIGHTNING_ROOMS = re.compile(r"ldm/models/|ldm/data/module\.py|ldm/training/|ldm/jobs\.py|main\.py")
MACHINE = r"(?<![\w.])/(home|work|root)/|\bshared/(goldens|data|spec|seeds)"
FORBIDDEN_TEXT = re.compile(rf"{MACHINE}|\bpdb\b|\.cuda\(|np\.random\.|numpy\.random\b")
DRAWS = re.compile(
    r"torch\.(rand|randn|randint|randperm|rand_like|randn_like|randint_like|normal|bernoulli|multinomial)"
)
DRAWS_IN_PLACE = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_"}
GLOBAL_SEEDS = re.compile(
    r"(torch(\.cuda|\.random)?\.(manual_seed|manual_seed_all|seed)|.*\bseed_everything|random\.(?!Random\b)\w+)"
)
CODE = (ast.Assign, ast.AugAssign, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Return, ast.Raise)
CODE += (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Assert, ast.Delete)


class Source(NamedTuple):
    """A Python file: path relative to the repository, text, syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def source(path, text):
    return Source(path, text, ast.parse(text))


def room(module):
    """(level, room) of the longest prefix in LEVELS; top-level scripts are level 11, benchmarks below them."""
    parts = module.split(".")
    prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next(((LEVELS[prefix], prefix) for prefix in prefixes if prefix in LEVELS), (11, "scripts"))


@cache
def nodes(tree):
    return tuple(ast.walk(tree))


def walk(file, *kinds):
    return (node for node in nodes(file.tree) if isinstance(node, kinds))


def imports(file):
    """(line, dotted name) of each import; names of `from a import b` are a.b, which may be a module."""
    for node in walk(file, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
            continue
        package = file.module.split(".") if file.path.endswith("__init__.py") else file.module.split(".")[:-1]
        base = package[: len(package) - node.level + 1] if node.level else []
        stem = ".".join([*base, *filter(None, [node.module])])
        yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def name_of(node):
    """The dotted name of an expression such as torch.cuda.seed, '' for any other."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(file):
    return ((node, name_of(node.func)) for node in walk(file, ast.Call))


def rule_imports_go_down(file):
    level, own = room(file.module)
    if file.path in DOORS:
        return
    if own == "ldm" and file.module not in BASE:
        yield f"1: {file.module} has no room: add it to LEVELS, beside its place in the design"
    for line, name in imports(file):
        target_level, target = room(name)
        if name.split(".")[0] == "ldm" and not (target_level < level or target == own):
            yield f"{line}: {own} (level {level}) imports {name} of {target} (level {target_level})"
        if own != "scripts" and name.split(".")[0] in SCRIPTS:
            yield f"{line}: {own} imports the script {name}"


def rule_scripts_start_alone(file):
    """Python puts scripts/ on its path, not the folder above: other scripts are found once `run_script` runs."""
    top = [node for node in file.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    if file.path.startswith("scripts/"):
        for line, name in imports(file._replace(tree=ast.Module(top, []))):
            if name.split(".")[0] in SCRIPTS:
                yield f"{line}: imports the script {name} before `run_script` runs: import it inside a function"


def rule_modules_are_torch_only(file):
    for line, name in imports(file) if room(file.module)[1] == "ldm.modules" else ():
        if name.split(".")[0] not in MODULES_MAY_IMPORT and not name.startswith(MODULES_BASE):
            yield f"{line}: ldm.modules imports {name}"


def rule_lightning_stays_in_its_rooms(file):
    for line, name in imports(file):
        if name.split(".")[0] in LIGHTNING and not LIGHTNING_ROOMS.match(file.path):
            yield f"{line}: imports {name}"


def rule_no_argparse_below_commands(file):
    """A library function never takes what a command line parsed."""
    if not file.path.startswith("ldm/") or file.path.startswith("ldm/commands/"):
        return
    yield from (f"{line}: imports {name}" for line, name in imports(file) if name.split(".")[0] == "argparse")
    for node in walk(file, ast.Name, ast.Attribute):
        if name_of(node).split(".")[-1] == "Namespace":
            yield f"{node.lineno}: a Namespace"


def near_limits(file):
    """What has come within a tenth of a limit: mend the idea before the limit is met."""
    lines = file.text.count("\n")
    if lines > 0.9 * FILE_LINES:
        yield f"{file.path}: {lines} lines of {FILE_LINES}"
    for node in walk(file, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef):
        limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
        length = node.end_lineno - node.lineno + 1
        if length > 0.9 * limit:
            yield f"{file.path}: {node.name} has {length} lines of {limit}"


def prose_share(files):
    """The share of lines that are comments or docstrings."""
    prose = total = 0
    for file in files:
        tokens = tokenize.generate_tokens(io.StringIO(file.text).readline)
        lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
        for node in walk(file, ast.Module, ast.ClassDef, ast.FunctionDef):
            for child in node.body:
                is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                if is_text and isinstance(child.value.value, str):
                    lines.update(range(child.lineno, child.end_lineno + 1))
        prose += len(lines)
        total += file.text.count("\n")
    return prose / total


def rule_sizes(file):
    lines, (limit, _) = file.text.count("\n"), RAISED_LIMITS.get(file.path, (FILE_LINES, ""))
    if lines > limit:
        yield f"1: the file has {lines} lines, more than {limit}"
    for node in walk(file, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef):
        limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
        length = node.end_lineno - node.lineno + 1
        if length > limit:
            yield f"{node.lineno}: {node.name} has {length} lines, more than {limit}"


def rule_no_commented_out_code(file):
    for token in tokenize.generate_tokens(io.StringIO(file.text).readline):
        text = token.string.lstrip("#").strip()
        if token.type != tokenize.COMMENT or text.startswith(("noqa", "type:", "fmt:", "!")):
            continue
        try:
            body = ast.parse(f"{text} pass" if text.endswith(":") else text).body
        except SyntaxError:
            continue
        called = [node for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
        if called or any(isinstance(node, CODE) for node in body):
            yield f"{token.start[0]}: a comment that is code: {text}"


def rule_no_forbidden_text(file):
    for number, line in enumerate(file.text.splitlines(), 1):
        if found := FORBIDDEN_TEXT.search(line):
            yield f"{number}: '{found[0]}'"


def rule_no_bare_except(file):
    yield from (f"{node.lineno}: bare except" for node in walk(file, ast.ExceptHandler) if node.type is None)


def rule_one_torch_load(file):
    names = {"torch.load", "torch.jit.load"} if file.path != "ldm/checkpoint.py" else set()
    yield from (f"{node.lineno}: {name}, use ldm.checkpoint" for node, name in calls(file) if name in names)


def rule_damage_is_named(file):
    guarded = set()
    for node in walk(file, ast.With, ast.Try):
        named = isinstance(node, ast.Try) or any(
            isinstance(item.context_expr, ast.Call) and name_of(item.context_expr.func) == "reading"
            for item in node.items
        )
        parts = [*node.body, *getattr(node, "items", [])] if named else []
        guarded |= {child for part in parts for child in ast.walk(part)}
    for node, name in calls(file) if file.path.startswith("ldm/") else ():
        copied = name == "json.loads" and ast.unparse(node).startswith("json.loads(json.dumps(")
        if name in READERS and node not in guarded and not copied:
            yield f"{node.lineno}: {name} names no file where it is damaged, use ldm.files"


def rule_files_are_written_whole(file):
    whole = set()
    for node in walk(file, ast.With):
        if any(name_of(getattr(item.context_expr, "func", item.context_expr)) == "atomic_write" for item in node.items):
            whole |= {child for part in node.body for child in ast.walk(part)}
    for node, name in calls(file) if file.path.startswith("ldm/") else ():
        if name in ARRAY_WRITERS:
            if file.path != "ldm/files.py":
                yield f"{node.lineno}: {name}, use ldm.files.write_arrays"
        elif name.split(".")[-1] in WRITERS and node not in whole:
            yield f"{node.lineno}: {name} may leave half a file behind, use ldm.files.atomic_write"


def rule_no_global_randomness(file):
    for node, name in calls(file):
        given = any(keyword.arg == "generator" for keyword in node.keywords)
        in_place = name.split(".")[-1] in DRAWS_IN_PLACE and "init." not in name
        if GLOBAL_SEEDS.fullmatch(name) or ((DRAWS.fullmatch(name) or in_place) and not given):
            yield f"{node.lineno}: {name} uses the global random state, pass generator="


def rule_no_mutable_defaults(file):
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for node in walk(file, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda):
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            called = name_of(default.func) if isinstance(default, ast.Call) else ""
            if isinstance(default, displays) or called in ("list", "dict", "set") or called.startswith("torch."):
                yield f"{default.lineno}: mutable default {ast.unparse(default)}"


def rule_library_does_not_print(file):
    if room(file.module)[0] <= 3:
        yield from (f"{node.lineno}: print" for node, name in calls(file) if name == "print")


def public_names(tree):
    """(line, name) of each public function, class and constant that a module defines at its top level."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        else:
            continue
        yield from ((node.lineno, name) for name in names if not name.startswith("_") and name not in SHARED_NAMES)


def name_clashes(files):
    """Places of each public name that two modules of `ldm` define, by name."""
    places = defaultdict(dict)
    for file in files:
        if file.path.startswith("ldm/"):
            for line, name in public_names(file.tree):
                places[name].setdefault(file.path, line)
    return {
        name: [f"{path}:{line}" for path, line in where.items()] for name, where in places.items() if len(where) > 1
    }


def fingerprint(function):
    """The body without docstring, with arguments and local names numbered, so that renaming hides no copy."""
    function = ast.parse(ast.unparse(function)).body[0]
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    names = [argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)]
    names += [node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    numbers = {name: f"v{number}" for number, name in enumerate(dict.fromkeys(names))}
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = numbers.get(node.id, node.id)
    return len(names), "\n".join(map(ast.dump, body)), sum(len(ast.unparse(node).splitlines()) for node in body)


def copies(files):
    """Places of functions that share a body of more than five lines."""
    places = defaultdict(list)
    for file in files:
        for node in walk(file, ast.FunctionDef, ast.AsyncFunctionDef):
            *key, lines = fingerprint(node)
            if lines > 5:
                places[tuple(key)].append(f"{file.path}:{node.lineno} {node.name}")
    return [where for where in places.values() if len(where) > 1]


def circles(files):
    """Modules of `ldm` that import themselves by way of others; imports in functions and for types count too."""
    modules = {file.module for file in files if file.path.startswith("ldm/")}
    arrows = {module: set() for module in modules}
    for file in files:
        for _, name in imports(file) if file.module in modules else ():
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name not in ("", "ldm", file.module):
                arrows[file.module].add(name)
    found = []
    for module in modules:
        reached, ahead = set(), set(arrows[module])
        while ahead:
            reached |= ahead
            ahead = {name for each in ahead for name in arrows[each]} - reached
        if module in reached:
            found.append(module)
    return sorted(found)


RULES = {name.removeprefix("rule_"): rule for name, rule in list(globals().items()) if name.startswith("rule_")}
SCRIPT_FILES = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
TREE = [
    source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("ldm/**/*.py"), *SCRIPT_FILES])
]
SCRIPTS = {"main", "scripts", "benchmarks", *(file.module for file in TREE if "/" not in file.path)}
TEXTS = [
    path
    for pattern in ("*.md", "*.toml", "*.txt", "*.sh", "configs/**/*.yaml", "scripts/**/*.sh", "docs/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
