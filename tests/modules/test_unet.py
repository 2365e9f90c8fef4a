"""The UNet against outputs, keys and parameter counts of the published implementations."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jvp, stack_module_state, vmap

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import split_last_layer
from tests.conftest import assert_published_weights, golden_json, golden_tensors, recipe_weights

TOLERANCE = 3e-5  # of the maximum: ten times what other kernels were seen to move the same network
VARIANTS = ("heads1", "heads2", "headch16")
TINY = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 2,
}
SPATIAL = TINY | {"use_spatial_transformer": True, "context_dim": 16}
ADM = TINY | {"out_channels": 6, "num_classes": 10, "use_scale_shift_norm": True, "resblock_updown": True}
ADM_WIDE = {"in_channels": 3, "out_channels": 6, "num_heads": 4, "use_scale_shift_norm": True, "resblock_updown": True}


def assert_close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def golden_net(variant: str = "heads1", **changes) -> UNetModel:
    spec = golden_json("unet_small")
    net = UNetModel(**spec["config"], **spec["variants"][variant]["kwargs"], **changes)
    net.load_state_dict(recipe_weights(spec))
    return net.eval()


def random_net(config: dict, seed: int = 0, **changes) -> UNetModel:
    """A network none of whose layers is zero."""
    net = UNetModel(**config, **changes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    return net.eval()


def inputs(batch: int = 2, tokens: int = 1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=dtype)
    context = torch.randn(batch, tokens, 16, generator=generator, dtype=dtype)
    return x, torch.linspace(3, 900, batch, dtype=dtype), context


def test_a_network_too_narrow_to_tell_times_apart_says_so(caplog):
    """Norms with a channel a group take out an added constant; a scale and shift after the norm, or width, remain."""
    x, times, _ = inputs()

    def seen(net):
        return (net(x, times) - net(x, times + 100)).abs().max()

    assert seen(random_net(TINY | {"channel_mult": [1, 1]})) < 1e-4
    assert "cannot tell times apart" in caplog.text
    caplog.clear()
    for changes in ({"channel_mult": [1, 1], "use_scale_shift_norm": True}, {"channel_mult": [1, 2]}):
        assert seen(random_net(TINY | changes)) > 1e-3
    assert not caplog.text


@pytest.mark.parametrize("stem", ["unet_small", "unet_small_plain"])
def test_rebuilt_weights_are_the_stored_ones(stem):
    assert_published_weights(stem, recipe_weights(golden_json(stem)))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_spatial_unet_matches_published_outputs(variant):
    net, io = golden_net(variant), golden_tensors("unet_small_io")
    assert_close(net(io["x"], io["t"], io["context_len1"]), io[f"{variant}/out_len1"])
    assert_close(net(io["x"], io["t"], io["context_len4"]), io[f"{variant}/out_len4"])
    assert_close(net(io["x_rect"], io["t_rect"], io["context_rect"]), io[f"{variant}/out_rect"])
    assert_close(net(io["x"], io["t_fractional"], io["context_len1"]), io[f"{variant}/out_tfrac"])


def test_gradients_match_published_ones():
    net, io = golden_net(), golden_tensors("unet_small_io")
    x, context = io["x"].requires_grad_(), io["context_len4"].requires_grad_()
    loss = net(x, io["t"], context).square().mean()
    loss.backward()
    assert_close(loss.detach(), io["grad/loss"])
    assert_close(x.grad, io["grad/d_x"])
    assert_close(context.grad, io["grad/d_context_len4"])


@torch.no_grad()
def test_block_statistics_match_published_ones():
    net, io = golden_net(), golden_tensors("unet_small_io")
    seen = []
    names = {
        row["block"]: row
        for row in golden_json("unet_small")["block_stats_first_variant_x_t_len4"]
        if row["block"] in dict(net.named_modules())
    }
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda _module, _args, out, name=name: seen.append((name, out)))
    net(io["x"], io["t"], io["context_len4"])
    assert {name for name, _ in seen} == set(names)
    for name, out in seen:
        row = names[name]
        assert list(out.shape) == row["shape"]
        assert out.mean().item() == pytest.approx(row["mean"], abs=1e-5 * row["std"])
        assert out.std().item() == pytest.approx(row["std"], rel=1e-5)


@torch.no_grad()
def test_plain_unet_matches_published_output():
    spec, io = golden_json("unet_small_plain"), golden_tensors("unet_small_plain_io")
    net = UNetModel(**spec["config"]).eval()
    net.load_state_dict(recipe_weights(spec))
    assert [name for name, _ in net.named_parameters()] == spec["state_dict_order"]
    assert_close(net(io["x"], io["t"]), io["out"])


def test_keys_of_the_released_imagenet_model():
    prefix = "model.diffusion_model."
    published = [(name, shape) for name, shape, _ in golden_json("keys_cin256")["keys"] if name.startswith(prefix)]
    config = {"attention_resolutions": [8, 4, 2], "channel_mult": [1, 2, 3, 5], "num_heads": 1, "context_dim": 512}
    with torch.device("meta"):
        net = UNetModel(64, 3, 192, 3, 2, use_spatial_transformer=True, transformer_depth=1, **config)
    assert [(prefix + name, list(value.shape)) for name, value in net.state_dict().items()] == published
    assert sum(parameter.numel() for parameter in net.parameters()) == 400_920_579


@pytest.mark.parametrize(
    ("count", "size", "width", "depth", "mult", "attention", "classes"),
    [
        (57_094_662, 32, 128, 3, (1, 2, 2, 2), (2, 4), None),  # CIFAR-10
        (295_136_454, 64, 192, 3, (1, 2, 3, 4), (2, 4, 8), None),  # LSUN tower 64
        (295_904_454, 64, 192, 3, (1, 2, 3, 4), (2, 4, 8), 1000),  # ImageNet 64
        (542_811_398, 128, 256, 3, (1, 1, 2, 3, 4), (4, 8, 16), None),  # FFHQ 128
        (421_529_606, 128, 256, 2, (1, 1, 2, 3, 4), (4, 8, 16), 1000),  # ImageNet 128
    ],
)
def test_parameter_counts_of_released_adm_models(count, size, width, depth, mult, attention, classes):
    with torch.device("meta"):
        net = UNetModel(
            image_size=size,
            model_channels=width,
            num_res_blocks=depth,
            channel_mult=mult,
            attention_resolutions=attention,
            num_classes=classes,
            **ADM_WIDE,
        )
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@torch.no_grad()
def test_stages_compose_to_forward_and_last_layer_splits_off():
    net, (x, t, context) = random_net(SPATIAL), inputs()
    expected = net(x, t, context)
    assert torch.equal(net.out(net.features(x, net.condition(t), context)), expected)
    phi, layer = split_last_layer(net, "out.2")
    assert layer is net.out[2]
    assert torch.equal(layer(phi(x, t, context)), expected)
    assert torch.equal(phi(x, t, context), net.out[:-1](net.backbone(x, t, context)))
    with pytest.raises(ValueError, match=r"last layer of UNetModel is 'out\.2'"):
        split_last_layer(net, "out.0")


@torch.no_grad()
def test_labels_add_their_row_to_the_embedding_of_time():
    net, (x, t, _) = random_net(ADM), inputs()
    y = torch.tensor([4, 9])
    of_time = net.time_embed(_sinusoids(t))
    torch.testing.assert_close(net.condition(t, y), of_time + net.label_emb.weight[y])
    assert net(x, t, y=y).shape == (2, 6, 8, 8)
    torch.testing.assert_close(net(x, t[0], y=y), net(x, t[:1].expand(2), y=y))  # one time for all


def _sinusoids(t):
    angles = t[:, None] * 10000 ** (-torch.arange(16) / 16)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@torch.no_grad()
def test_new_attention_order_is_a_permutation_of_the_rows_of_qkv():
    old, (x, t, _) = random_net(TINY), inputs()
    new = UNetModel(**TINY, use_new_attention_order=True).eval()
    weights = old.state_dict()
    for name in weights:
        if ".qkv." in name:
            rows = weights[name].unflatten(0, (2, 3, -1))  # heads, (q, k, v), width
            weights[name] = rows.transpose(0, 1).flatten(0, 2)
    new.load_state_dict(weights)
    torch.testing.assert_close(new(x, t), old(x, t))


@torch.no_grad()
def test_heads_on_the_way_up():
    wide, legacy = UNetModel(**TINY, num_heads_upsample=4), UNetModel(**TINY)
    newer = UNetModel(**TINY, num_heads_upsample=4, legacy=False)
    heads = [net.output_blocks[0][1].num_heads for net in (wide, legacy, newer)]
    assert heads == [4, 2, 2]
    remainder = SPATIAL | {"num_heads": -1, "num_head_channels": 24}  # 64 channels: two heads
    widths = [UNetModel(**remainder, legacy=legacy).middle_block[1].proj_in.out_channels for legacy in (True, False)]
    assert widths == [64, 48]


def test_code_predictor_replaces_the_readout():
    net, (x, t, _) = random_net(TINY, n_embed=5), inputs()
    assert net(x, t).shape == (2, 5, 8, 8)
    phi, layer = split_last_layer(net, "id_predictor.1")
    assert torch.equal(layer(phi(x, t)), net(x, t))


@pytest.mark.parametrize("config", [SPATIAL, ADM], ids=["spatial", "adm"])
def test_checkpointing_reaches_inputs_of_a_frozen_trunk(config):
    x, t, context = inputs(tokens=2)
    y = torch.tensor([1, 2])

    def gradients(use_checkpoint, frozen):
        net = random_net(config, use_checkpoint=use_checkpoint).requires_grad_(not frozen)
        emb = net.condition(t, y if net.num_classes else None).detach().requires_grad_()
        tokens = context.clone().requires_grad_()
        image = x.clone().requires_grad_()
        net.out(net.features(image, emb, tokens if net.context_dim else None)).square().mean().backward()
        weights = [] if frozen else [parameter.grad for parameter in net.parameters()]
        return [emb.grad, image.grad, tokens.grad, *weights]

    for frozen in (True, False):
        plain, recomputed = gradients(False, frozen), gradients(True, frozen)
        assert plain[0].abs().max() > 0
        for a, b in zip(plain, recomputed, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-9)


def test_checkpointing_recomputes_with_the_parameters_of_functional_call():
    x, t, context = inputs()
    other = {name: value.detach().requires_grad_() for name, value in random_net(SPATIAL, seed=5).named_parameters()}
    results = []
    for use_checkpoint in (False, True):
        net = random_net(SPATIAL, use_checkpoint=use_checkpoint)
        loss = functional_call(net, other, (x, t, context)).square().mean()
        results.append(torch.autograd.grad(loss, [other["out.2.weight"], other["input_blocks.0.0.weight"]]))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("config", [SPATIAL, ADM], ids=["spatial", "adm"])
@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_vmap_over_stacked_parameters_equals_a_loop(config, tokens):
    nets = [random_net(config, seed=seed) for seed in range(3)]
    x, t, context = inputs(tokens=tokens)
    extra = (context,) if nets[0].context_dim else (None, torch.tensor([1, 2]))
    parameters, buffers = stack_module_state(nets)
    stacked = vmap(lambda p, b: functional_call(nets[0], (p, b), (x, t, *extra)))(parameters, buffers)
    assert_close(stacked, torch.stack([net(x, t, *extra) for net in nets]), 1e-5)


@torch.no_grad()
def test_vmap_over_inputs_equals_the_batch():
    net, (x, t, context) = random_net(SPATIAL), inputs(batch=3, tokens=2)
    singly = vmap(lambda *args: net(*(a[None] for a in args))[0])(x, t, context)
    assert_close(singly, net(x, t, context), 1e-5)


@pytest.mark.parametrize("tokens", [1, 2])
def test_jvp_over_inputs_and_parameters_equals_finite_differences(tokens):
    net, (x, t, context) = random_net(SPATIAL).double(), inputs(tokens=tokens, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    primal = (x, context, parameters)
    tangent = (torch.randn(x.shape, generator=generator).double(), torch.ones_like(context), dict(parameters))

    def run(x, context, parameters):
        return functional_call(net, parameters, (x, t, context))

    _, derivative = jvp(run, primal, tangent)
    step = 1e-6

    def shifted(sign):
        moved = {name: value + sign * step * value for name, value in parameters.items()}
        return run(x + sign * step * tangent[0], context + sign * step * tangent[1], moved)

    with torch.no_grad():
        difference = (shifted(1) - shifted(-1)) / (2 * step)  # error about step^2 and rounding / step
    assert_close(derivative, difference, 1e-7)


@torch.no_grad()
def test_half_precision_torso_stays_near_single():
    net, (x, t, context) = golden_net(), inputs()
    expected = net(x, t, context)
    net.convert_to_fp16()
    assert net.out[2].weight.dtype == net.input_blocks[1][0].in_layers[0].weight.dtype == torch.float32
    assert net.middle_block[1].transformer_blocks[0].attn1.to_q.weight.dtype == torch.float16
    assert_close(net(x, t, context), expected, 2e-2)  # half precision has 11 bits; some tens of layers
    net.convert_to_fp32()
    assert_close(net(x, t, context), expected, 2e-2)
    assert UNetModel(**TINY, use_fp16=True).input_blocks[0][0].weight.dtype == torch.float16


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims):
    net = random_net(TINY | {"conv_resample": False}, dims=dims)
    x = torch.randn(1, 3, *[4] * dims, generator=torch.Generator().manual_seed(0))
    assert net(x, torch.tensor([5])).shape == x.shape


def test_errors_say_what_to_do():
    net, (x, t, context) = random_net(SPATIAL), inputs()
    with pytest.raises(ValueError, match=r"context must be \[2, T, 16\], got None"):
        net(x, t)
    with pytest.raises(ValueError, match="H and W multiples of 2"):
        net(x[..., :7], t, context)
    with pytest.raises(ValueError, match="labels y are needed exactly if num_classes"):
        net(x, t, context, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="needs timesteps"):
        net(x, None, context)
    with pytest.raises(ValueError, match="set one of them"):
        UNetModel(**TINY | {"num_heads": -1})
    with pytest.raises(ValueError, match="go together"):
        UNetModel(**TINY, context_dim=4)


@pytest.mark.parametrize("variant", ["context", "labels"])
def test_one_image_under_several_conditions(variant):
    """Fewer rows of x than of conditions give what repeated rows give, for B and for one time."""
    net = random_net(SPATIAL if variant == "context" else ADM).double()
    x, t, _ = inputs(dtype=torch.float64)
    several = {"context": inputs(6, 3, torch.float64)[2]}
    if variant == "labels":
        several = {"y": torch.tensor([0, 1, 2, 3, 4, 0])}
    with torch.no_grad():
        for time in (t, t[:1]):
            rows = time.repeat(3) if len(time) == 2 else time.expand(6)
            expected = net(x.repeat(3, 1, 1, 1), rows, **several)
            torch.testing.assert_close(net(x, time, **several), expected)
        assert (expected[:2] - expected[2:4]).abs().max() > 1e-6
    with pytest.raises(ValueError, match="3 times or labels for 2 images"):
        net.features(x, torch.zeros(3, 128).double(), several.get("context"))
