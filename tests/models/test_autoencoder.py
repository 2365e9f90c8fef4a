"""First stages against published outputs and keys; tiny ones are trained."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface
from ldm.modules.losses import LPIPS
from tests.conftest import assert_published_weights, golden_json, golden_tensors, recipe_weights

TOLERANCE = 3e-5  # of the maximum
NO_LOSS = {"target": "torch.nn.Identity"}
TINY = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def golden_weights() -> dict[str, torch.Tensor]:
    """By the recipe; the codebook has the mean and deviation of the golden's latents."""
    weights = recipe_weights(golden_json("vq_small"))
    latents = golden_tensors("vq_small_io")["encode"]
    draws = torch.randn(64, 3, generator=torch.Generator().manual_seed(2003))
    weights["quantize.embedding.weight"] = latents.mean((0, 2, 3)) + latents.std((0, 2, 3)) * draws
    return weights


def golden_model(kind):
    model = kind(**golden_json("vq_small")["config"])
    model.load_state_dict(golden_weights())
    return model.eval()


def test_rebuilt_weights_are_the_stored_ones():
    assert_published_weights("vq_small", golden_weights())


@torch.no_grad()
def test_interface_matches_published_outputs():
    model, io = golden_model(VQModelInterface), golden_tensors("vq_small_io")
    assert_close(model.encode(io["image"]), io["encode"])
    assert_close(model.encode(io["image_rect"]), io["encode_rect"])
    assert_close(model.decode(io["encode"]), io["decode_of_encode"])
    assert_close(model.decode(io["encode_rect"]), io["decode_rect"])
    assert_close(model.decode(io["encode"], force_not_quantize=True), io["decode_no_quant"])
    assert_close(model.decode(io["z"]), io["z/decode"])
    assert_close(model.decode(io["z"], force_not_quantize=True), io["z/decode_no_quant"])
    for source, name in (("encode", "quantize"), ("z", "z")):
        quantised, loss, (_, _, indices) = model.quantize(io[source])
        assert torch.equal(indices, io[f"{name}/indices"])
        assert_close(quantised, io[f"{name}/zq"])
        assert_close(loss, io[f"{name}/loss"])


@torch.no_grad()
def test_model_matches_published_outputs():
    model, io = golden_model(VQModel), golden_tensors("vq_small_io")
    reconstruction, loss, indices = model(io["image"], return_pred_indices=True)
    assert_close(model.encode(io["image"])[0], io["vqmodel_encode/zq"])
    assert_close(reconstruction, io["vqmodel_forward/dec"])
    assert_close(loss, io["vqmodel_forward/diff"])
    assert torch.equal(indices, io["vqmodel_forward/indices"])
    assert_close(model.decode_code(indices.reshape(2, 8, 8)), io["vqmodel_forward/dec"])


def test_keys_of_the_released_first_stage():
    prefix = "first_stage_model."
    published = [(name, shape) for name, shape, _ in golden_json("keys_cin256")["keys"] if name.startswith(prefix)]
    config = TINY | {"resolution": 256, "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2}
    with torch.device("meta"):
        model = VQModelInterface(embed_dim=3, n_embed=8192, ddconfig=config, lossconfig=NO_LOSS)
    assert {(prefix + name, *value.shape) for name, value in model.state_dict().items()} == {
        (name, *shape) for name, shape in published
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == 55_322_782


def loss_config(kind: str, adversarial: bool, **more) -> dict:
    params = {"disc_start": 1, "perceptual_weight": 0.0, "disc_ndf": 8, "disc_num_layers": 1, "disc_in_channels": 3}
    params |= {"disc_weight": 0.1 if adversarial else 0.0} | more
    return {"target": f"ldm.modules.losses.{kind}", "params": params}


def tiny_model(kind: str, adversarial: bool, **more):
    torch.manual_seed(0)
    if kind == "VQLoss":
        loss = loss_config(kind, adversarial)
        model = VQModel(ddconfig=TINY, lossconfig=loss, n_embed=16, embed_dim=3, monitor="val/rec_loss", **more)
    else:
        loss = loss_config(kind, adversarial, kl_weight=1e-6)
        model = AutoencoderKL(ddconfig=TINY | {"double_z": True}, lossconfig=loss, embed_dim=3, **more)
    model.learning_rate = 1e-3
    return model


def images(count: int = 8) -> torch.Tensor:
    """Smooth images `[N, 16, 16, 3]` in [-1, 1]."""
    ramp = torch.linspace(-1, 1, 16)
    tint = torch.rand(count, 1, 1, 3, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return ((ramp[:, None, None] + ramp[None, :, None]) / 2 * tint).float()


def train(model, steps: int, tmp_path, **options):
    loader = DataLoader([{"image": image} for image in images()], batch_size=4)
    trainer = pl.Trainer(
        max_epochs=steps // 2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        check_val_every_n_epoch=steps // 2,
        **options,
    )
    trainer.fit(model, loader, loader)
    return trainer


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("kind", ["VQLoss", "KLLoss"])
def test_training_lowers_the_reconstruction_error(tmp_path, kind, adversarial):
    model = tiny_model(kind, adversarial)
    batch = images().movedim(-1, 1)

    def error():
        with torch.no_grad():
            return (model.eval()(batch)[0] - batch).abs().mean().item()

    before = error()
    patches = model.loss.discriminator.main[0].weight.detach().clone() if adversarial else None
    trainer = train(model.train(), 16, tmp_path)
    assert error() < 0.7 * before
    assert model.automatic_optimization is not adversarial
    assert model.generator_step == 16 and trainer.global_step == (32 if adversarial else 16)
    assert not adversarial or not torch.equal(model.loss.discriminator.main[0].weight, patches)
    assert {"val/rec_loss", "val/aeloss"} <= trainer.callback_metrics.keys()


def test_averages_resizing_and_schedule_act(tmp_path):
    schedule = {"target": "tests.models.test_autoencoder.Halving"}
    model = tiny_model("VQLoss", True, use_ema=True, batch_resize_range=(8, 16), scheduler_config=schedule)
    sizes = []
    model.encoder.register_forward_hook(lambda _module, args, _out: sizes.append(args[0].shape[-1]))
    trainer = train(model, 8, tmp_path)
    assert sizes[2:7] == [16] * 5 and set(sizes) <= {8, 16, 24}  # two sanity batches, then steps 0 to 4
    assert int(model.model_ema.num_updates) == 8
    assert [group["lr"] for one in trainer.optimizers for group in one.param_groups] == [1e-3 / 256] * 2
    assert "val_ema/rec_loss" in trainer.callback_metrics
    weight = model.decoder.conv_out.weight.detach().clone()
    with model.ema_scope():
        assert torch.equal(model.decoder.conv_out.weight, model.model_ema.decoderconv_outweight)
    assert torch.equal(model.decoder.conv_out.weight, weight)
    shown = model.eval().log_images({"image": images(2)}, plot_ema=True, split="val")
    assert {name: tuple(value.shape) for name, value in shown.items()} == dict.fromkeys(
        ("inputs", "reconstructions", "reconstructions_ema"), (2, 3, 16, 16)
    )


def test_averages_move_once_a_step_of_accumulated_batches(tmp_path):
    model = tiny_model("VQLoss", False, use_ema=True)
    train(model, 4, tmp_path, accumulate_grad_batches=2)
    assert model.global_step == int(model.model_ema.num_updates) == 2


class Halving:
    """The factor 1/2 to the power of the step."""

    def schedule(self, step: int) -> float:
        return 0.5**step


def test_a_checkpoint_with_a_loss_loads_without_one(tmp_path):
    trained = tiny_model("VQLoss", True, use_ema=True)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "vq.ckpt")
    common = {"ddconfig": TINY, "n_embed": 16, "embed_dim": 3, "ckpt_path": str(tmp_path / "vq.ckpt")}
    loaded = VQModelInterface(lossconfig=NO_LOSS, **common)
    assert torch.equal(loaded.decoder.conv_out.weight, trained.decoder.conv_out.weight)
    wider = loss_config("VQLoss", True, disc_ndf=16)
    with pytest.raises(ValueError, match=r"loss\.discriminator"):
        VQModel(lossconfig=wider, **common)
    VQModel(lossconfig=wider, ignore_keys=["loss"], **common)


def test_perceptual_weights_are_read_from_a_first_stage_checkpoint(tmp_path):
    lpips = LPIPS()
    lpips.lin0["model"][1].weight.data.fill_(0.5)
    state = {f"loss.perceptual_loss.{name}": value for name, value in lpips.state_dict().items()}
    torch.save({"state_dict": state | {"decoder.x": torch.zeros(1)}}, tmp_path / "vq.ckpt")
    loss = loss_config("VQLoss", False, perceptual_weight=1.0, lpips_path=str(tmp_path / "vq.ckpt"))
    model = VQModel(ddconfig=TINY, lossconfig=loss, n_embed=16, embed_dim=3)
    model.on_fit_start()
    assert model.loss.perceptual_loss.lin0["model"][1].weight.max() == 0.5


def test_training_without_a_loss_says_what_is_needed(tmp_path):
    model = VQModel(ddconfig=TINY, lossconfig=NO_LOSS, n_embed=16, embed_dim=3)
    with pytest.raises(ValueError, match=r"lossconfig such as ldm\.modules\.losses\.VQLoss"):
        train(model, 2, tmp_path)
    with pytest.raises(ValueError, match="set image_key"):
        model.get_input({"picture": images()}, "image")
    with pytest.raises(ValueError, match=r"multiples of 2, got \[1, 3, 7, 8\]"):
        model.encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match="double_z: true"):
        AutoencoderKL(ddconfig=TINY, lossconfig=NO_LOSS, embed_dim=3)


@torch.no_grad()
def test_kl_autoencoder_draws_by_its_generator():
    model = tiny_model("KLLoss", False).eval()
    x = images(2).movedim(-1, 1)
    posterior = model.encode(x)
    assert posterior.mean.shape == (2, 3, 8, 8)
    torch.testing.assert_close(model(x)[0], model.decode(posterior.mean))
    drawn = model(x, torch.Generator().manual_seed(4))[0]
    torch.testing.assert_close(drawn, model.decode(posterior.sample(torch.Generator().manual_seed(4))))


@torch.no_grad()
def test_attention_and_its_absence():
    attentive = TINY | {"attn_resolutions": [8], "attn_type": "vanilla"}
    bare = TINY | {"attn_type": "none", "resamp_with_conv": False, "tanh_out": True}
    keys = []
    for config in (attentive, bare):
        model = VQModel(ddconfig=config, lossconfig=NO_LOSS, n_embed=16, embed_dim=3)
        assert model(torch.zeros(1, 3, 16, 16))[0].shape == (1, 3, 16, 16)
        keys.append([name for name in model.state_dict() if "attn" in name])
    assert any(name.startswith("encoder.down.1.attn.0.q") for name in keys[0])
    assert any(name.startswith("decoder.up.1.attn.1.proj_out") for name in keys[0])
    assert keys[1] == []


def test_identity_first_stage():
    x = torch.ones(1, 3, 2, 2)
    plain, quantising = IdentityFirstStage(), IdentityFirstStage(vq_interface=True)
    assert plain.decode(plain.encode(x)) is x and plain.quantize(x) is x
    assert quantising.quantize(x) == (x, None, (None, None, None))
