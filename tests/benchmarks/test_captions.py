"""The study of captions: which words are hidden, and its figures on known mutual information."""

import pytest

from benchmarks.captions import choose_hidden, compare_rows
from ldm.experiments.counted import make_prompts


def test_prompts_have_every_digit_in_every_kind_and_style():
    prompts = make_prompts(counted=True)
    assert len(prompts) == 40
    assert len({(one.digit, one.style) for one in prompts.values()}) == 40
    assert {text for text, one in prompts.items() if one.digit == 7 and one.count == 2} == {"two handwritten sevens"}
    assert len(make_prompts(counted=False)) == 40 and "an inverted eight" in make_prompts(counted=False)


def test_hidden_words_move_on_with_the_seed():
    names = [str(number) for number in range(10)]
    chosen = [choose_hidden(names, seed) for seed in range(5)]
    assert sorted(name for one in chosen for name in one) == sorted([*names, *names])
    assert [len(choose_hidden("abc", seed)) for seed in range(3)] == [1, 1, 1]


def test_figures_of_known_information():
    """Hidden words have three times the control's information, others as much; the control's order is another."""
    rows = []
    for seed in (0, 1):
        for word, (plain, hidden) in {"a": (4.0, False), "b": (1.0, True), "c": (2.0, True), "d": (3.5, False)}.items():
            factor = 3 if hidden else 1
            for prompt in (1.0, 1.1):
                control = plain * prompt
                row = {"seed": seed, "word": word, "hidden": hidden}
                rows.append({**row, "mi": factor * control, "control": control})
    found = compare_rows(rows)
    assert (found["words"], found["hidden"]) == (8, 4)
    assert found["ratio_hidden"] == pytest.approx(3) and found["ratio_seen"] == pytest.approx(1)
    assert found["auroc_control"] == 0 and found["auroc_mi"] == pytest.approx(0.5) and found["auroc_ratio"] == 1
    assert found["ratio_low"] < 1
