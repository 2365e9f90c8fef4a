"""`bases` of a config: what is merged, in which order, from where, what is refused; and how configs/ uses them."""

import itertools
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from ldm.training.config import find_config, load_config, packaged_configs, read_config, take_section, to_plain
from ldm.training.runs import RunDirectory

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*/*.yaml"))
COPY = 0.9  # share of equal lines above which one of two files should be made of the other's parts
# Configs of a family, and all that a reader should find different between them.
TWINS = {
    "latent-diffusion/celebahq-ldm-vq-4 ffhq-ldm-vq-4": "paths.data_root data.params.batch_size",
    "latent-diffusion/celebahq-ldm-vq-4 lsun_bedrooms-ldm-vq-4": "paths.data_root data.params.train.params.flip",
    "autoencoder/autoencoder_kl_32x32x4 autoencoder_kl_64x64x3": "model.params.embed_dim "
    "model.params.ddconfig.z_channels model.params.ddconfig.ch_mult",
    "flow-matching/fashion-mnist kmnist": "paths.data_root model.params.pretrained_path data.params.train.target "
    "data.params.validation.target components.data.params.train.params.dataset.target "
    "components.data.params.train.params.folder",
    "ddae/EDM_ddpm EDM_ddpmpp": "model.params.scheduler_config.params.warm_up_steps "
    "model.params.unet_config.params.ch_mults model.params.unet_config.params.is_attn "
    "model.params.unet_config.params.n_blocks model.params.unet_config.params.use_res_for_updown "
    "data.params.global_batch_size",
}


def lines(path: Path) -> list[str]:
    """The lines of a file that are neither empty nor a comment."""
    return [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]


def leaves(node: object, prefix: str = "") -> dict[str, object]:
    """The values of a plain config by their dotted keys; a list is a value."""
    if not isinstance(node, dict):
        return {prefix: node}
    found = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}.{key}".lstrip("."))
    return found


@pytest.fixture
def write(tmp_path):
    """Write files by name and text, and return the path of the first."""

    def write(**texts: str) -> Path:
        paths = [tmp_path / f"{name.replace('__', '/')}.yaml" for name in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return paths[0]

    return write


def test_bases_are_merged_from_left_to_right_below_the_files_own_keys(write):
    file = write(
        own="bases: [left.yaml, right.yaml]\nmodel: {own: 3}\n",
        left="model: {left: 1, both: 1, own: 1}\n",
        right="model: {right: 2, both: 2, own: 2}\n",
    )
    assert read_config(file) == {"model": {"left": 1, "right": 2, "both": 2, "own": 3}}


def test_one_base_may_be_a_word_and_is_relative_to_the_file_that_names_it(write, tmp_path, monkeypatch):
    file = write(
        family__own="bases: ../_bases/middle.yaml\nown: 1\n",
        _bases__middle="bases: [first.yaml]\nmiddle: 1\n",
        _bases__first="first: 1\nmiddle: 0\nown: 0\n",
    )
    monkeypatch.chdir(tmp_path / "family")
    assert read_config(file) == read_config("own.yaml") == {"first": 1, "middle": 1, "own": 1}


def test_a_base_that_two_files_share_is_no_cycle(write):
    file = write(own="bases: [a.yaml, b.yaml]\n", a="bases: c.yaml\na: 1\n", b="bases: c.yaml\nb: 1\n", c="c: 1\n")
    assert read_config(file) == {"a": 1, "b": 1, "c": 1}


def test_lists_null_and_other_targets_replace_what_a_base_says(write):
    """`null` says what it says without bases: the value is none. A node of another target loses the params it had."""
    file = write(
        own="bases: base.yaml\nlist: [3]\nrate: null\nnet: {target: y, params: {b: 2}}\nsame: {params: {b: 2}}\n",
        base="list: [1, 2]\nrate: 1\nnet: {target: x, params: {a: 1}}\nsame: {target: x, params: {a: 1}}\n",
    )
    assert read_config(file) == {
        "list": [3],
        "rate": None,
        "net": {"target": "y", "params": {"b": 2}},
        "same": {"target": "x", "params": {"a": 1, "b": 2}},
    }


def test_bases_act_below_later_files_components_and_words(write, tmp_path):
    """`--base a b x=y`: the bases of `b` go on top of all of `a`; `components` of a base count as the file's own."""
    first = write(
        first="bases: base.yaml\nmodel: {rate: 1}\n",
        base="paths: {root: here}\nmodel: {rate: 0, root: '${paths.root}'}\ncomponents: {model: {rate: 3, width: 5}}\n",
        second="bases: other.yaml\ncomponents: {model: {width: 6}}\n",
        other="model: {rate: 2, depth: 2}\n",
    )
    files = [str(first), str(tmp_path / "second.yaml")]
    whole = load_config(files, ["paths.root=there"])
    assert whole == {"paths": {"root": "there"}, "model": {"rate": 2, "root": "there", "depth": 2}}
    assert load_config(files, component=True).model == {"rate": 3, "root": "here", "depth": 2, "width": 6}
    run = RunDirectory(tmp_path / "run")
    run.configs.mkdir(parents=True)
    text = run.write_config(whole, "project").read_text()
    assert "bases" not in text and run.config() == whole, "a run directory does not need the files that it was made of"


def test_a_circle_is_refused_with_the_way_around_it(write):
    file = write(a="bases: b.yaml\n", b="bases: c.yaml\n", c="bases: a.yaml\n")
    with pytest.raises(
        ValueError, match=r"own base; remove a link of .*a\.yaml -> .*b\.yaml -> .*c\.yaml -> .*a\.yaml$"
    ):
        read_config(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bases: [_absent.yaml]", r"own\.yaml names _absent\.yaml in bases, which are relative to it, but there is no"),
        ("bases: {a: b}", r"bases in .*own\.yaml must be a path or a list of paths, got"),
        ("bases: [1]", "must be a path or a list of paths"),
        ("bases:", "must be a path or a list of paths, got None"),
        ("[1, 2]", r"own\.yaml must hold a mapping of keys to values"),
        ("bases: broken.yaml", r"broken\.yaml .*this is no YAML: .* in line 2"),
    ],
)
def test_what_is_no_base_is_refused_in_one_sentence(write, text, message):
    file = write(own=text, broken="a: [1")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_config([str(file)], needs=())


def test_bases_are_no_word_of_the_command_line(write):
    with pytest.raises(ValueError, match="acts only in a YAML file"):
        load_config([str(write(own="a: 1"))], ["bases=other.yaml"], needs=())


def test_every_file_of_configs_is_read_and_begins_with_a_comment():
    for file in FILES:
        assert read_config(file), file
        assert file.read_text().startswith("# "), f"{file}: the first line says what it is"


def test_no_two_files_of_configs_are_near_copies():
    content = {file: lines(file) for file in FILES}
    for one, other in itertools.combinations(FILES, 2):
        match = SequenceMatcher(None, content[one], content[other], autojunk=False)
        close = match.real_quick_ratio() > COPY and match.quick_ratio() > COPY and match.ratio() > COPY
        assert not close, f"{one} and {other}: put what they share in a file that both name in `bases`"


def test_every_shared_part_is_a_base_of_several_files():
    users: dict[Path, int] = {}
    for file in FILES:
        named = yaml.safe_load(file.read_text()).get("bases", [])
        for base in [named] if isinstance(named, str) else named:
            path = (file.parent / base).resolve()
            users[path] = users.get(path, 0) + 1
    shared = {file for file in FILES if file.name.startswith("_") or file.parent.name == "_bases"}
    assert shared, "there are shared parts"
    alone = {file for file in shared if users.get(file.resolve(), 0) < 2}
    assert not alone, "what one file uses belongs in that file"


@pytest.mark.parametrize("pair", TWINS)
def test_configs_of_a_family_differ_only_where_they_should(pair):
    family, names = pair.split("/")
    configs = [read_config(CONFIGS / family / f"{name}.yaml") for name in names.split()]
    one, other = (leaves(OmegaConf.to_container(config, resolve=False)) for config in configs)
    different = {key for key in {*one, *other} if key not in one or key not in other or one[key] != other[key]}
    assert different == set(TWINS[pair].split())


def test_a_config_of_the_project_is_known_by_its_name_in_any_folder(tmp_path, monkeypatch):
    name = "configs/latent-diffusion/digits.yaml"
    whole = read_config(CONFIGS.parent / name)
    monkeypatch.chdir(tmp_path)
    assert packaged_configs() == CONFIGS
    assert find_config(name) == CONFIGS.parent / name
    assert read_config(name) == whole
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("model: {target: mine}")
    assert find_config(name) == Path(name)
    assert read_config(name) == {"model": {"target": "mine"}}


def test_a_config_that_is_nowhere_is_an_error_that_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/latent-diffusion/none.yaml", "latent-diffusion/digits.yaml", "/configs/ddae/digits.yaml"):
        with pytest.raises(ValueError, match="there is no config") as caught:
            read_config(name)
        assert all(word in str(caught.value) for word in (name, str(tmp_path), str(CONFIGS)))


def test_a_section_is_taken_out_with_what_refers_to_it_filled_in():
    config = OmegaConf.create(
        {
            "model": {"steps": ["${lightning.trainer.max_steps}"], "root": "${paths.root}"},
            "paths": {"root": "a"},
            "lightning": {"trainer": {"max_steps": 7, "name": "${paths.root}"}},
        }
    )
    rest, section = take_section(config, "lightning")
    plain = OmegaConf.to_container(rest, resolve=False)
    assert plain == {"model": {"steps": [7], "root": "${paths.root}"}, "paths": {"root": "a"}}
    assert section == {"trainer": {"max_steps": 7, "name": "a"}}
    assert take_section(rest, "lightning") == (rest, {})


def test_an_interpolation_that_is_none_names_the_file(write):
    file = write(half="model: {params: {timesteps: '${'}}")
    with pytest.raises(ValueError, match=r"half.yaml is damaged, or is not a config"):
        read_config(file)


def test_components_may_wrap_what_they_replace(write):
    """`dataset: ${data.train}` inside the key data.train of `components` is what the file itself has there."""
    inner = "data: {size: 3, train: {target: a.Own, params: {size: '${data.size}'}}}"
    outer = "components: {data: {train: {target: b.Subset, params: {dataset: '${data.train}', size: '${data.size}'}}}}"
    path = str(write(own=f"model: {{}}\n{inner}\n{outer}\n"))
    member = to_plain(load_config([path], ["data.size=4"], component=True))
    own = {"target": "a.Own", "params": {"size": 4}}
    assert member["data"]["train"] == {"target": "b.Subset", "params": {"dataset": own, "size": 4}}
    assert to_plain(load_config([path]))["data"]["train"]["params"] == {"size": 3}
