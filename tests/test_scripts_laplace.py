"""Posteriors from the command line, fit and samples, on tiny models: what they give, resume and refuse."""

import numpy as np
import pytest
import torch

from ldm.laplace import LastLayerLaplace, load_laplace
from ldm.pipelines import build_model, observations
from scripts import fit_laplace, sample_laplace
from tests.cli import call
from tests.conftest import tiny_config
from tests.posteriors import DIGITS, opened_with, table, write_model, write_posterior


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_posterior(tmp_path_factory.mktemp("laplace"))


class LeftHalf(torch.nn.Module):
    """A segmentation model that knows where the object is."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns

    def forward(self, images):
        return (torch.arange(images.shape[-1]) < self.columns).double().expand(images.shape[0], *images.shape[2:])


def test_a_fit_is_that_of_its_observations_whatever_the_parts(place, monkeypatch, tmp_path):
    folder, words = place
    pipeline = opened_with(words[:6])
    saved = load_laplace(folder / "fit", pipeline.model.network)
    data = fit_laplace.instantiate_from_config(DIGITS)
    positions = fit_laplace.chosen_positions(len(data), 40, 42)
    rows = observations(pipeline.model, data, positions, draws=2, seed=42, batch_size=7)
    direct = LastLayerLaplace(pipeline.model.network).fit(rows, draws=2, data_size=len(data))
    torch.testing.assert_close(saved.fitted().gram, direct.fitted().gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(saved.sigma_noise, direct.optimize_sigma_noise(), rtol=1e-5, atol=0)
    assert (saved.data_size, int(saved.fitted().images), saved.prior_precision) == (len(data), 40, 50.0)
    monkeypatch.setattr(fit_laplace, "PART", 16)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fit = [*words[:6], "--n", "40", "--draws", "2", "--prior_precision", "50", "--out", str(tmp_path / "parts")]
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        fit_laplace.main(fit)
        assert (tmp_path / "parts" / "laplace.yaml").exists() == (rank == "1")
    shared = load_laplace(tmp_path / "parts", pipeline.model.network)
    torch.testing.assert_close(shared.fitted().gram, saved.fitted().gram, rtol=1e-5, atol=1e-4)
    with pytest.raises(FileExistsError, match="holds a posterior"):
        fit_laplace.main(fit)


def test_a_fit_has_no_parts_of_other_settings(place, monkeypatch, tmp_path, capsys):
    """A stopped fit, then one with other noise draws in the same folder, whose parts have the same names."""
    _, words = place
    fit = [*words[:6], "--n", "10", "--prior_precision", "50", "--out", str(tmp_path)]
    monkeypatch.setattr(fit_laplace, "PART", 5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    fit_laplace.main([*fit, "--draws", "2"])
    monkeypatch.delenv("WORLD_SIZE")
    pipeline, data = opened_with(words[:6]), fit_laplace.instantiate_from_config(DIGITS)
    positions = fit_laplace.chosen_positions(len(data), 10, 42)
    for seed in (42, 43):
        fit_laplace.main([*fit, "--draws", "1", *(["--seed", "43", "--overwrite"] if seed == 43 else [])])
        assert len(list(tmp_path.glob("parts*"))) == (2 if seed == 42 else 1)
        positions = fit_laplace.chosen_positions(len(data), 10, seed)
        direct = LastLayerLaplace(pipeline.model.network).fit(observations(pipeline.model, data, positions, seed=seed))
        found = load_laplace(tmp_path, pipeline.model.network).fitted()
        torch.testing.assert_close(found.gram, direct.fitted().gram, rtol=1e-5, atol=1e-4)
        assert (int(found.images), int(found.draws)) == (10, 10)
    assert capsys.readouterr().out.count("discarded") == 2
    fit_laplace.main([*fit, "--draws", "1", "--seed", "43", "--overwrite", "--sigma_noise", "2"])
    assert "discarded" not in capsys.readouterr().out
    assert load_laplace(tmp_path, pipeline.model.network).sigma_noise.tolist() == [2.0]


def test_observations_are_what_training_regresses(place):
    """The mean squared residual of a fit is the training loss at the same draws."""
    _, words = place
    pipeline, data = opened_with(words[:6]), fit_laplace.instantiate_from_config(DIGITS)
    model = pipeline.model
    (rows,) = observations(model, data, range(6), draws=3, seed=1, batch_size=6)
    assert rows.x.shape == (18, 1, 8, 8) and rows.cond.shape == (18,)
    t, noise, _ = (torch.cat(parts) for parts in zip(*[_draws(model, image) for image in range(6)], strict=True))
    clean = torch.stack([data[image]["image"] for image in range(6)]).permute(0, 3, 1, 2).repeat_interleave(3, 0)
    condition = model.cond_stage_model.embed(rows.cond)
    _, parts = model.p_losses(clean, condition, t, noise)
    residual = (model.network(rows.x, rows.t, rows.cond) - rows.target).square().mean()
    torch.testing.assert_close(residual, parts["val/loss_simple"])


def _draws(model, image):
    from ldm.diffusion.noise import TrainingDraws

    return TrainingDraws(1, purpose="laplace")(image, range(3), (1, 8, 8), model.num_timesteps)


def test_the_published_fit_and_merging(place, tmp_path):
    folder, words = place
    pipeline = opened_with(words[:6])
    published = load_laplace(folder / "published", pipeline.model.network)
    assert published.curvature == "ef" and published.published_ef
    assert (published.prior_precision, published.sigma_noise.tolist(), published.data_size) == (1.0, [1.0], 20)
    both = [str(folder / "fit")] * 2
    fit_laplace.main([*words[:6], "--merge", *both, "--prior_precision", "50", "--out", str(tmp_path / "both")])
    merged = load_laplace(tmp_path / "both", pipeline.model.network)
    torch.testing.assert_close(merged.fitted().gram, 2 * load_laplace(both[0], pipeline.model.network).fitted().gram)


@pytest.mark.parametrize("method", ["persistent", "tangents", "published"])
def test_samples_are_the_plain_samplers_with_maps(place, tmp_path, method):
    folder, words = place
    more = ["--features", "classifier", "--weights", str(folder / "c.safetensors")] if method == "persistent" else []
    looks = ["--control_maps", "energy", "edges", "differences", "seeds", "--seeds", "2", "--masks", "saliency"]
    looks += ["--mask", "tests.test_scripts_laplace.LeftHalf", "--mask_params", "columns=3"]
    out = tmp_path / "out"
    arguments = [
        *words,
        "--method",
        method,
        "--n",
        "6",
        "--batch_size",
        "4",
        "--shown",
        "2",
        *looks,
        *more,
        "--out",
        str(out),
    ]
    sample_laplace.main(arguments)
    plain = [*words[:6], *words[8:10], "--n", "6", "--out", str(tmp_path / "plain")]
    call("sample model", plain)
    found, expected = np.load(out / "samples.npz"), np.load(tmp_path / "plain" / "samples.npz")
    assert found["step_maps"].shape == (2, 4, 8, 8)
    np.testing.assert_allclose(found["step_maps"].sum((2, 3)), found["step_sums"][:2], rtol=1e-4)
    np.testing.assert_array_equal(found["arr_0"], expected["arr_0"])
    assert found["map"].shape == (6, 8, 8) and found["step_sums"].shape == (6, 4)
    if method != "published":
        assert (found["map"] > 0).all()
    rows = table(out / "scores.csv")
    np.testing.assert_allclose([float(row["sum"]) for row in rows], found["map"].sum((1, 2)), rtol=1e-5)
    left = found["map"][:, :, :3].mean((1, 2))
    np.testing.assert_allclose([float(row["segmentation_model"]) for row in rows], left, rtol=1e-5)
    names = {"control_map_energy", "control_map_edges", "control_map_differences", "control_map_seeds"}
    assert names <= set(rows[0]) and ("feature_entropy" in rows[0]) == bool(more)
    assert {"maps.png", "steps.png", "ranked.png", "record.json"} <= {file.name for file in out.iterdir()}
    if method == "persistent":
        before = (out / "scores.csv").read_text()
        sample_laplace.main(arguments)
        assert (out / "scores.csv").read_text() == before


def test_what_could_only_fail_late_is_refused_before_any_work(place, tmp_path):
    _, words = place
    out = ["--out", str(tmp_path / "out")]
    for more, message in (
        (["--rank_by", "segmentation_saliency"], "--rank_by must be .* segmentation_threshold"),
        (["--rank_by", "feature_entropy"], "--rank_by must be"),
        (["--method", "path", "--features", "classifier"], "--method persistent, got path"),
        (["--control_maps", "seeds", "--seeds", "1"], "at least 2"),
        (["--method", "path", "--clip_denoised"], "path knows neither clipping"),
        (["--method", "published", "--sampler", "Heun"], "Heun is not first order"),
        (["--method", "bayesdiff", "--sampler", "Dopri5"], "Dopri5 chooses its steps by the state"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_laplace.main([*words, *more, *out])
    assert not (tmp_path / "out").exists()


def test_flows_and_other_samplers(tmp_path):
    """A continuous path, without guidance: fit, bins by time, and BayesDiff's recursion along Heun."""
    flow = {"path_config": {"target": "ldm.diffusion.schedule.FlowSchedule"}, "parameterization": "velocity"}
    words = write_model(tmp_path, **flow)
    fit = ["--n", "20", "--draws", "2", "--bins", "3", "--prior_precision", "20", "--out", str(tmp_path / "fit")]
    fit_laplace.main([*words, *fit])
    pipeline = opened_with(words)
    laplace = load_laplace(tmp_path / "fit", pipeline.model.network)
    assert len(laplace.sigma_noise) == 3 and laplace.time_edges == pytest.approx([1 / 3, 2 / 3])
    sampled = [
        "--posterior",
        str(tmp_path / "fit"),
        "--steps",
        "3",
        "--n",
        "4",
        "--sampler",
        "Heun",
        "--draws",
        "2",
        "--shown",
        "1",
    ]
    for method in ("bayesdiff_skip", "persistent", "path"):
        sample_laplace.main([*words, *sampled, "--method", method, "--out", str(tmp_path / method)])
        assert (np.load(tmp_path / method / "samples.npz")["map"] > 0).all()
    with pytest.raises(ValueError, match="not first order"):
        sample_laplace.main([*words, *sampled, "--method", "published", "--out", str(tmp_path / "no")])


def test_a_latent_model_gets_maps_of_pixels(tmp_path):
    """A quantised first stage of factor 2: members are decoded, tangents pushed, draws of a recursion decoded."""
    ddconfig = {
        "double_z": False, "z_channels": 1, "resolution": 16, "in_channels": 1, "out_ch": 1, "ch": 32,
        "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    params = {"embed_dim": 1, "n_embed": 64, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    stage = {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}
    words = write_model(tmp_path, first_stage_config=stage)
    pipeline = opened_with(words)
    images = torch.rand(8, 16, 16, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = [{"image": image, "class_label": number % 10} for number, image in enumerate(images)]
    rows = list(observations(pipeline.model, data, draws=2, batch_size=4))
    assert rows[0].x.shape == (8, 1, 8, 8)
    laplace = LastLayerLaplace(pipeline.model.network, prior_precision=5.0).fit(rows, draws=2)
    fit_laplace.save_laplace(laplace, tmp_path / "fit")
    maps = {}
    for method in ("persistent", "tangents", "bayesdiff"):
        shared = [
            *words,
            "--posterior",
            str(tmp_path / "fit"),
            "--steps",
            "2",
            "--n",
            "3",
            "--draws",
            "4",
            "--shown",
            "1",
        ]
        sample_laplace.main([*shared, "--method", method, "--out", str(tmp_path / method)])
        maps[method] = np.load(tmp_path / method / "samples.npz")["map"]
        assert maps[method].shape == (3, 16, 16) and (maps[method] >= 0).all() and maps[method].max() > 0


def test_learned_variances_have_a_posterior_of_their_regressed_half(tmp_path):
    """ADM's networks give two halves; only the first is regressed."""
    config = tiny_config()
    config["params"]["unet_config"]["params"]["out_channels"] = 2
    config["params"]["learned_variance"] = "hybrid"
    model = build_model({"model": config})
    pipeline = type("Opened", (), {"model": model})()
    laplace = fit_laplace.new_posterior(pipeline)
    assert (laplace.layer.outputs, len(laplace.layer.layer.weight)) == (1, 2)
