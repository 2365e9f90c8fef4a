"""Posteriors by commands, fit and samples, on tiny models: what they give, resume and refuse."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from ldm.commands.laplace_fit import Curvature, FitLaplace
from ldm.commands.laplace_sample import ControlMap, MaskName, SampleLaplace
from ldm.commands.shared import PosteriorSource, VarianceMethod
from ldm.data.digits import Digits
from ldm.experiments.variance_samples import CONTROL_MAPS
from ldm.images import to_uint8
from ldm.laplace import CURVATURES, LastLayerLaplace, load_laplace, save_laplace
from ldm.pipelines import (
    METHODS,
    PosteriorPipeline,
    build_model,
    chosen_positions,
    fitting,
    new_posterior,
    observations,
)
from ldm.settings import Sampling
from ldm.uncertainty.scores import MASKS
from tests.conftest import tiny_config
from tests.posteriors import CPU, table, write_model, write_posterior


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_posterior(tmp_path_factory.mktemp("laplace"))


def test_the_commands_know_what_the_library_knows():
    assert set(get_args(Curvature)) == set(CURVATURES) and set(get_args(MaskName)) == set(MASKS)
    assert get_args(VarianceMethod) == tuple(METHODS) and get_args(ControlMap) == CONTROL_MAPS
    for name, what in METHODS.items():
        assert f"{name:15} {what}" in SampleLaplace.__doc__


def test_one_draw_has_no_variance():
    for method in ("persistent", "redrawn"):
        with pytest.raises(ValueError, match="needs --draws of at least 2; got 1"):
            PosteriorPipeline(None, None, draws=1).check(method)


def test_a_fit_is_that_of_its_observations_whatever_the_parts(place, monkeypatch, tmp_path):
    pipeline, data = place.load(), Digits(split="train")
    saved = load_laplace(place.folder / "fit", pipeline.model.network)
    positions = chosen_positions(len(data), 40, 42)
    rows = observations(pipeline.model, data, positions, draws=2, seed=42, batch_size=7)
    direct = LastLayerLaplace(pipeline.model.network).fit(rows, draws=2, data_size=len(data))
    torch.testing.assert_close(saved.fitted().gram, direct.fitted().gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(saved.sigma_noise, direct.optimize_sigma_noise(), rtol=1e-5, atol=0)
    assert (saved.data_size, int(saved.fitted().images), saved.prior_precision) == (len(data), 40, 50.0)
    monkeypatch.setattr(fitting, "IMAGES_A_PART", 16)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fit = FitLaplace(place.model, str(tmp_path / "parts"), n=40, draws=2, prior_precision=50.0, place=CPU)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        fit.run()
        assert (tmp_path / "parts" / "laplace.yaml").exists() == (rank == "1")
    shared = load_laplace(tmp_path / "parts", pipeline.model.network)
    torch.testing.assert_close(shared.fitted().gram, saved.fitted().gram, rtol=1e-5, atol=1e-4)
    with pytest.raises(FileExistsError, match="holds a posterior"):
        fit.run()


def test_a_fit_has_no_parts_of_other_settings(place, monkeypatch, tmp_path, capsys):
    """A stopped fit, then one with other noise draws in the same folder, whose parts have the same names."""
    fit = FitLaplace(place.model, str(tmp_path), n=10, prior_precision=50.0, draws=1, place=CPU)
    monkeypatch.setattr(fitting, "IMAGES_A_PART", 5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    replace(fit, draws=2).run()
    monkeypatch.delenv("WORLD_SIZE")
    pipeline, data = place.load(), Digits(split="train")
    for seed in (42, 43):
        replace(fit, seed=seed, overwrite=seed == 43).run()
        assert len(list(tmp_path.glob("parts*"))) == (2 if seed == 42 else 1)
        positions = chosen_positions(len(data), 10, seed)
        direct = LastLayerLaplace(pipeline.model.network).fit(observations(pipeline.model, data, positions, seed=seed))
        found = load_laplace(tmp_path, pipeline.model.network).fitted()
        torch.testing.assert_close(found.gram, direct.fitted().gram, rtol=1e-5, atol=1e-4)
        assert (int(found.images), int(found.draws)) == (10, 10)
    assert capsys.readouterr().out.count("discarded") == 2
    replace(fit, seed=43, overwrite=True, sigma_noise=2.0).run()
    assert "discarded" not in capsys.readouterr().out
    assert load_laplace(tmp_path, pipeline.model.network).sigma_noise.tolist() == [2.0]


def test_observations_are_what_training_regresses(place):
    """The mean squared residual of a fit is the training loss at the same draws."""
    model, data = place.load().model, Digits(split="train")
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
    network = place.load().model.network
    published = load_laplace(place.folder / "published", network)
    assert published.curvature == "ef" and published.published_ef
    assert (published.prior_precision, published.sigma_noise.tolist(), published.data_size) == (1.0, [1.0], 20)
    both = (str(place.folder / "fit"),) * 2
    FitLaplace(place.model, str(tmp_path / "both"), merge=both, prior_precision=50.0, place=CPU).run()
    merged = load_laplace(tmp_path / "both", network)
    torch.testing.assert_close(merged.fitted().gram, 2 * load_laplace(both[0], network).fitted().gram)
    with pytest.raises(ValueError, match="--published sets --draws to 1"):
        FitLaplace(place.model, "unused", published=True, draws=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["persistent", "tangents", "published"])
def test_samples_are_the_plain_samplers_with_maps(place, tmp_path, method):
    more = {"features": "classifier", "weights": place.classifier} if method == "persistent" else {}
    out = tmp_path / "out"
    command = SampleLaplace(
        out=str(out),
        method=method,
        n=6,
        batch_size=4,
        shown=2,
        control_maps=("energy", "edges", "differences", "seeds"),
        seeds=2,
        masks=("saliency",),
        mask="tests.posteriors.LeftHalf",
        mask_params=("columns=3",),
        **place.shared,
        **more,
    )
    command.run()
    pipeline = place.load()
    expected = to_uint8(pipeline.decode(pipeline.sample_latents(pipeline.cycle_classes(range(6)), range(6))))
    found = np.load(out / "samples.npz")
    assert found["step_maps"].shape == (2, 4, 8, 8)
    np.testing.assert_allclose(found["step_maps"].sum((2, 3)), found["step_sums"][:2], rtol=1e-4)
    np.testing.assert_array_equal(found["arr_0"], expected)
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
        command.run()
        assert (out / "scores.csv").read_text() == before


def test_what_could_only_fail_late_is_refused_before_any_work(place, tmp_path):
    for changes, message in (
        ({"rank_by": "segmentation_saliency"}, "--rank_by must be .* segmentation_threshold"),
        ({"rank_by": "feature_entropy"}, "--rank_by must be"),
        ({"method": "path", "features": "classifier"}, "--method persistent, got path"),
        ({"control_maps": ("seeds",), "seeds": 1}, "at least 2"),
        ({"method": "path", "sampling": Sampling(steps=4, clip=True)}, "path knows neither clipping"),
        ({"method": "published", "sampling": Sampling("Heun", steps=4)}, "Heun is not first order"),
        ({"method": "bayesdiff", "sampling": Sampling("Dopri5", steps=4)}, "Dopri5 chooses its steps by the state"),
        ({"method": "published", "sampling": Sampling("DPM-Solver-2", steps=4)}, "DPM-Solver-2 is not first order"),
        ({"method": "bayesdiff", "sampling": Sampling("DPM-Solver++SDE", 4)}, "draws noise between its evaluations"),
        ({"method": "bayesdiff", "sampling": Sampling("Heun", 4, options={"S_churn": 2})}, "before its steps"),
    ):
        with pytest.raises(ValueError, match=message):
            SampleLaplace(**{**place.shared, "out": str(tmp_path / "out"), **changes}).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bayesdiffs_template_of_the_second_order_solver(place, tmp_path):
    """Its dpm.sh: variances along DPM-Solver-2 on times even in log SNR, every step begun again from the states."""
    sampling = Sampling("DPM-Solver-2", 3, spacing="logsnr")
    options = {**place.shared, "sampling": sampling, "out": str(tmp_path / "out"), "method": "bayesdiff_skip"}
    SampleLaplace(n=4, shown=1, **options).run()
    found = np.load(tmp_path / "out" / "samples.npz")
    plain = place.load(sampler="DPM-Solver-2", steps=3, spacing="logsnr")
    images = to_uint8(plain.decode(plain.sample_latents(plain.cycle_classes(range(4)), range(4))))
    np.testing.assert_array_equal(found["arr_0"], images)
    assert (found["map"] > 0).all() and found["step_sums"].shape == (4, 3)


@pytest.mark.slow
def test_flows_and_other_samplers(tmp_path):
    """A continuous path, without guidance: fit, bins by time, and BayesDiff's recursion along Heun."""
    flow = {"path_config": {"target": "ldm.diffusion.schedule.FlowSchedule"}, "parameterization": "velocity"}
    model, folder = write_model(tmp_path, **flow), str(tmp_path / "fit")
    FitLaplace(model, folder, n=20, draws=2, bins=3, prior_precision=20.0, place=CPU).run()
    laplace = load_laplace(folder, model.load(device="cpu").model.network)
    assert len(laplace.sigma_noise) == 3 and laplace.time_edges == pytest.approx([1 / 3, 2 / 3])
    posterior, sampling = PosteriorSource(folder, draws=2), Sampling("Heun", steps=3)
    for method in ("bayesdiff_skip", "persistent", "path"):
        out = str(tmp_path / method)
        SampleLaplace(model, posterior, out, method, n=4, shown=1, sampling=sampling, place=CPU).run()
        assert (np.load(tmp_path / method / "samples.npz")["map"] > 0).all()
    with pytest.raises(ValueError, match="not first order"):
        SampleLaplace(model, posterior, str(tmp_path / "no"), "published", n=4, sampling=sampling, place=CPU).run()


@pytest.mark.slow
def test_a_latent_model_gets_maps_of_pixels(tmp_path):
    """A quantised first stage of factor 2: members are decoded, tangents pushed, draws of a recursion decoded."""
    ddconfig = {
        "double_z": False, "z_channels": 1, "resolution": 16, "in_channels": 1, "out_ch": 1, "ch": 32,
        "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    params = {"embed_dim": 1, "n_embed": 64, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    stage = {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}
    model = write_model(tmp_path, first_stage_config=stage)
    pipeline = model.load(device="cpu")
    images = torch.rand(8, 16, 16, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = [{"image": image, "class_label": number % 10} for number, image in enumerate(images)]
    rows = list(observations(pipeline.model, data, draws=2, batch_size=4))
    assert rows[0].x.shape == (8, 1, 8, 8)
    laplace = LastLayerLaplace(pipeline.model.network, prior_precision=5.0).fit(rows, draws=2)
    save_laplace(laplace, tmp_path / "fit")
    posterior, sampling = PosteriorSource(str(tmp_path / "fit"), draws=4), Sampling(steps=2)
    for method in ("persistent", "tangents", "bayesdiff"):
        out = str(tmp_path / method)
        SampleLaplace(model, posterior, out, method, n=3, shown=1, sampling=sampling, place=CPU).run()
        maps = np.load(tmp_path / method / "samples.npz")["map"]
        assert maps.shape == (3, 16, 16) and (maps >= 0).all() and maps.max() > 0


def test_learned_variances_have_a_posterior_of_their_regressed_half(tmp_path):
    """ADM's networks give two halves; only the first is regressed."""
    config = tiny_config()
    config["params"]["unet_config"]["params"]["out_channels"] = 2
    config["params"]["learned_variance"] = "hybrid"
    model = build_model({"model": config})
    pipeline = type("Opened", (), {"model": model, "checkpoint": None})()
    laplace = new_posterior(pipeline)
    assert (laplace.layer.outputs, len(laplace.layer.layer.weight)) == (1, 2)


def test_a_fit_to_images_of_another_size_than_the_models_is_refused(place, tmp_path):
    data = ("target=ldm.data.digits.Digits", "params.split=train", "params.image_size=16")
    with pytest.raises(ValueError, match=r"images of --data are 16 x 16, and the model's are 8 x 8"):
        FitLaplace(place.model, str(tmp_path / "fit"), data=data, n=4, draws=1, place=CPU).run()
