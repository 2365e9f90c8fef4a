"""Pages begin with what their tables say: numbers in sentences that a reader of the table would write himself."""

import json

import pytest

from ldm.report.pages import make_page
from ldm.report.sampling_sentences import describe_posterior
from ldm.report.tables import write_csv

FIT = {"layer": "out.2", "curvature": "full", "images": 200, "draws": 2, "data_size": 1438, "visits": 55.5556,
       "entries": 289, "channels": 1, "prior_precision": 898.135, "parameters_determined": 288.9}  # fmt: skip
TABLES = {
    "norms.csv": (
        [
            {"step": 0, "training": 10.0, "sampling": 10.1, "sampling_over_training": 1.01},
            {"step": 1, "training": 10.0, "sampling": 9.7, "sampling_over_training": 0.97},
        ],
        "on average 1 % shorter in sampling than in training, and differs most in step 2 of 2, where it is 3 % shorter",
    ),
    "states.csv": (
        [{"step": 0, "floor": 0.5, "sampling_delta": 0.75, "sampling_w2": 0.125}],
        "delta_t after the last step is 0.75, and a perfect sampler's 0.5; the squared distance of an element of x_t",
    ),
    "choice.csv": (
        [{"b": 1.0, "fid": 9.0}, {"b": 1.01, "fid": 4.0}, {"b": 1.02, "fid": 5.0}],
        "Of 3 values of b, 1.01 has the least fid, 4; b = 1, which scales nothing, has 9.",
    ),
    "scores.csv": (
        [
            {"image": place, "class": place % 2, "name": "red" if place % 2 else "blue", "sum": value}
            for place, value in enumerate((1.0, 5.0, 1.5, 7.0))
        ],
        "It is largest for red (6 [-6.706, 18.71], 2 samples) and least for blue (1.25 [-1.927, 4.427], 2 samples); "
        "their intervals do not lie apart.",
    ),
    "table.csv": (
        [
            {"removed by": "none", "kept": 4, "fid": 3.0, "z_fid": None, "p_fid": None},
            {"removed by": "sum", "kept": 3, "fid": 2.0, "z_fid": 3.1, "p_fid": 0.01},
            {"removed by": "max", "kept": 3, "fid": 5.0, "z_fid": -0.4, "p_fid": 0.6},
            {"removed by": "random", "kept": 3, "fid": 4.0, "z_fid": None, "p_fid": None},
        ],
        "fid of what is kept is better than random removal by sum (p at most 0.05 by Holm), of 2 scores.",
    ),
    "promise.csv": (
        [
            {"score": name, "of": "all", "promised": held, "accepted share": share, "accepted": 40, "bad": 1}
            for name, held, share in (("sum", True, 0.4), ("random", False, 0.0))
        ],
        "kept by 1 of 2 scores, with most samples accepted by sum: 40 %, of which 1 of 40 are bad; random, "
        "which knows nothing, by 0 %.",
    ),
    "results.csv": (
        [
            {"features": "trained", "t": 11.0, "layer": "mid", "test": 95.25, "deviation": 0.5, "seeds": 3},
            {"features": "pixels", "t": None, "layer": None, "test": 90.0, "deviation": 0.0, "seeds": 1},
        ],
        "A linear probe recognises 95.2 % ± 0.5 (s.d. of 3 seeds) of test images by the trained network's features at "
        "mid, t = 11; 90.0 % of test images by the pixels themselves.",
    ),
    "errors.csv": (
        [{"features": "trained", "class": 0, "name": "ant", "error": 2.0},
         {"features": "trained", "class": 1, "name": "bee", "error": 12.5}],
        "mistakes bee most, 12.5 % of its test images, and ant least, 2.0 %.",
    ),
    "metrics.csv": (
        [{"metric": name, "value": 12.0, "low": 11.0, "high": 13.5, "n": 500, "n_reference": 1000}
         for name in ("fid", "sfid", "recall", "cmmd_biased")],
        "Of 500 images, against 1,000 of the reference: FID 12 [11, 13.5]; recall 12 [11, 13.5] (95 % intervals in "
        "brackets; the table has more of them).",
    ),
    "ood.csv": (
        [
            {"pictures": "cats", "score": name, "evaluations": asked, "auroc": auroc, "low": 0.5, "high": 1.0}
            for name, asked, auroc in (("sum", 8, 0.875), ("edges", 0, 0.75))
        ],
        "cats is told from known pictures best by sum, AUROC 0.88 [0.50, 1.00]; of those that ask no network, by edges",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_page_begins_with_what_its_table_says(tmp_path, name):
    rows, words = TABLES[name]
    write_csv(tmp_path / "below" / name, rows)
    assert words in " ".join(make_page(tmp_path / "below").summary)
    assert make_page(tmp_path).summary[0].startswith("below: "), "of several results, each says which it is"


@pytest.mark.parametrize("name", TABLES)
def test_a_blank_cell_is_passed_over_or_the_table_is_named(tmp_path, name):
    rows = TABLES[name][0]
    for column in rows[0]:
        (tmp_path / name).unlink(missing_ok=True)
        write_csv(tmp_path / name, [{**row, column: None} for row in rows])
        try:
            make_page(tmp_path)
        except ValueError as error:
            assert name in str(error)


def test_promises_of_classes_are_counted_score_by_score(tmp_path):
    held = {("sum", "ant"): True, ("sum", "bee"): False, ("random", "ant"): True, ("random", "bee"): True}
    rows = [
        {"score": score, "of": name, "promised": kept, "accepted share": 1.0, "accepted": 40, "bad": 1}
        for (score, name), kept in held.items()
    ]
    write_csv(tmp_path / "promise.csv", rows)
    (said,) = make_page(tmp_path).summary
    assert said == (
        "sum keeps the promise in 1 of 2 classes: ant. random, which knows nothing, keeps the promise in 2 of 2 "
        "classes."
    )


def test_corrected_norms_and_an_edge_are_told(tmp_path):
    row = {"step": 0, "training": 10.0, "scaled": 11.0, "scaled_over_training": 1.1, "scaled_corrected": 10.2}
    write_csv(tmp_path / "norms.csv", [row])
    write_csv(tmp_path / "choice.csv", [{"b": 1.0, "norms": 2.0}, {"b": 1.1, "norms": 1.0}])
    said = " ".join(make_page(tmp_path).summary)
    assert "With epsilon scaling, noise as it is used is on average 2 % longer in sampling" in said
    assert "The best b lies at the edge of what was tried" in said


def test_a_posterior_has_a_page_of_its_own(tmp_path):
    record = {
        "command": ["__main__.py", "laplace", "fit", "--out", "a b"],
        "revision": "0123456789abcdef" * 2 + "0" * 8,
    }
    record["found"] = FIT
    (tmp_path / "record.json").write_text(json.dumps(record))
    page = make_page(tmp_path)
    assert "stands on 200 images with 2 draws of noise each; they stand for 1,438" in page.summary[0]
    (row,) = page.sections[-1].blocks[0].rows
    assert (row["command"], row["revision"]) == ("decu laplace fit --out 'a b'", "0123456789ab")
    assert "determine 289 of the 289 weights of each output" in page.summary[1]
    assert describe_posterior({**FIT, "images": "many"}) == [], "what no fit writes is left alone"


def test_tables_of_other_columns_are_shown_without_a_word(tmp_path):
    write_csv(tmp_path / "scores.csv", [{"picture": 0, "sum": 1.0}])
    assert make_page(tmp_path).summary == []
    write_csv(tmp_path / "norms.csv", [{"step": "x", "training": 1.0}])
    with pytest.raises(ValueError, match=r"norms.csv, row 1: step should be a number"):
        make_page(tmp_path)
