"""`bases` of a config: what is merged, in which order, from where, and what is refused."""

from pathlib import Path

import pytest

from ldm.training.config import load_config, read_config
from ldm.training.runs import RunDirectory


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
        ("bases: broken.yaml", r"no YAML.*broken\.yaml"),
    ],
)
def test_what_is_no_base_is_refused_in_one_sentence(write, text, message):
    file = write(own=text, broken="a: [1")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_config([str(file)], needs=())


def test_bases_are_no_word_of_the_command_line(write):
    with pytest.raises(ValueError, match="acts only in a YAML file"):
        load_config([str(write(own="a: 1"))], ["bases=other.yaml"], needs=())
