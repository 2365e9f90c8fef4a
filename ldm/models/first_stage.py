"""What all first stages share: batches, loading, averages, and training with or without a discriminator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.arguments import check_arguments
from ldm.checkpoint import load_into, load_state_dict
from ldm.models.diffusion.optimisation import make_factor
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.ema import LitEma
from ldm.modules.losses import LPIPS, FirstStageLoss
from ldm.util import generator, instantiate_as

LPIPS_PREFIX = "loss.perceptual_loss."


class FirstStage(pl.LightningModule):
    """What VQ and KL autoencoders share: batches, loading, averages, and training with or without a discriminator.

    With a discriminator the optimisation is manual, one step of each per batch. Lightning counts both, so
    `generator_step` is half its `global_step`.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        lossconfig: target and params of a `FirstStageLoss`; `torch.nn.Identity` where there is no training.
        image_key: entry of a batch with images `[B, H, W, C]` in [-1, 1].
        colorize_nlabels: number of label channels that `log_images` projects to colours.
        monitor: metric that selects checkpoints.
        batch_resize_range: smallest and largest size in pixels; training images are resized to a random one between,
            in steps of 16 (the largest in the first steps).
        scheduler_config: target and params of an object with `schedule(step)`, the factor on the learning rate.
        lr_g_factor: learning rate of encoder and decoder over that of the discriminator.
        use_ema: average the parameters.
        seed: of the draws in training.
    """

    learning_rate: float = 4.5e-6
    colorize: Tensor
    # Whether a file of its own was read.
    has_weights = False

    # Arguments that are keywords of something else: a config's are checked before anything is built.
    keyword_arguments: ClassVar[Mapping[str, Callable[..., Any]]] = {"ddconfig": Encoder}

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[int] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        use_ema: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.image_key = image_key
        self.scheduler_config = scheduler_config
        self.seed = seed
        self.lr_g_factor = lr_g_factor
        self.use_ema = use_ema
        self.batch_resize_range = None if batch_resize_range is None else tuple(batch_resize_range)
        if monitor is not None:
            self.monitor = monitor
        check_arguments(Encoder, dict(ddconfig), "ddconfig")
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_as(nn.Module, lossconfig, "model.params.lossconfig")
        if colorize_nlabels is not None:
            draws = torch.randn(3, colorize_nlabels, 1, 1, generator=generator("colorize", seed))
            self.register_buffer("colorize", draws)
        self.adversarial = isinstance(self.loss, FirstStageLoss) and self.loss.adversarial
        self.automatic_optimization = not self.adversarial

    def _complete(self, ckpt_path: str | None, ignore_keys: Sequence[str]) -> None:
        """Build the averages and read weights, once a subclass has built its parts."""
        if self.use_ema:
            self.model_ema = LitEma(self)
        lpips_path = getattr(self.loss, "lpips_path", None)
        if lpips_path is not None and isinstance(getattr(self.loss, "perceptual_loss", None), LPIPS):
            state = load_state_dict(lpips_path)
            inside = {k.removeprefix(LPIPS_PREFIX): v for k, v in state.items() if k.startswith(LPIPS_PREFIX)}
            load_into(self.loss.perceptual_loss, inside or state, file=lpips_path)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load a checkpoint; keys in `ignore_keys` (or under them) need not match.

        A loss without weights ignores those of the file, and so does a model without averages.
        """
        ignore = list(ignore_keys)
        if not self.loss.state_dict():
            ignore.append("loss.")
        if not self.use_ema:
            ignore.append("model_ema.")
        load_into(self, load_state_dict(path), ignore, path)
        self.has_weights = True

    def reconstruct(self, images: Tensor, split: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruction `[B, C, H, W]`, regulariser `[]` or `[B]`, and numbers to log by name."""
        raise NotImplementedError

    def get_last_layer(self) -> Tensor:
        """Weight at which the adversarial gradient is balanced with the other."""
        return self.decoder.conv_out.weight

    def seed_draws(self, seed: int, member: int = 0) -> None:
        """Choose the stream of the draws in training; `member` is for models that have members."""
        self.seed = seed

    def get_input(self, batch: Mapping[str, Tensor], key: str) -> Tensor:
        """Images `[B, C, H, W]` of a batch that holds them as `[B, H, W, C]` or `[B, H, W]`."""
        if key not in batch:
            raise ValueError(f"the batch has no '{key}'; its keys are {sorted(batch)}; set image_key")
        images = batch[key]
        images = images[..., None] if images.ndim == 3 else images  # [B, H, W, C]
        images = images.movedim(-1, 1).contiguous().float()  # [B, C, H, W]
        if self.batch_resize_range is None or not self.training:
            return images
        low, high = self.batch_resize_range
        step = self.generator_step
        choices = range(low, high + 16, 16)
        draw = torch.randint(len(choices), (), generator=generator("batch_resize", self.seed, step))
        size = high if step <= 4 else choices[int(draw)]
        return images if size == images.shape[2] else F.interpolate(images, size=size, mode="bicubic").detach()

    @property
    def generator_step(self) -> int:
        """Steps taken by the optimiser of encoder and decoder."""
        return self.global_step // (2 if self.adversarial else 1)

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Put the averaged parameters in place, if there are any."""
        if self.use_ema:
            self.model_ema.store(self.parameters())
            self.model_ema.copy_to(self)
        try:
            yield
        finally:
            if self.use_ema:
                self.model_ema.restore(self.parameters())

    def on_fit_start(self) -> None:
        if not isinstance(self.loss, FirstStageLoss):
            kind = type(self.loss).__name__
            raise ValueError(f"training needs a lossconfig such as ldm.modules.losses.VQLoss or KLLoss, got {kind}")
        self.loss.check_ready()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor | None:
        images, step = self.get_input(batch, self.image_key), self.generator_step
        if not self.adversarial:
            return self._autoencoder_loss(images, step, "train")[0]
        optimizer, disc_optimizer = cast(list, self.optimizers())
        self.toggle_optimizer(optimizer)
        loss, reconstructions = self._autoencoder_loss(images, step, "train")
        self._step(optimizer, loss)
        self.toggle_optimizer(disc_optimizer)
        loss, terms = self.loss.discriminator_loss(images, reconstructions.detach(), step)
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        self._step(disc_optimizer, loss)
        schedulers: Any = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()
        return None

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def _autoencoder_loss(self, images: Tensor, step: int, split: str) -> tuple[Tensor, Tensor]:
        reconstructions, regulariser, numbers = self.reconstruct(images, split)
        loss, terms = self.loss.generator_loss(images, reconstructions, regulariser, step, self.get_last_layer())
        terms = {"aeloss": terms["total_loss"]} | terms | numbers
        self.log_dict({f"{split}/{name}": value for name, value in terms.items()}, batch_size=len(images))
        return loss, reconstructions

    def on_train_start(self) -> None:
        self._averaged_step = self.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Step the averages after every optimiser step."""
        if self.use_ema and self.global_step != self._averaged_step:
            self._averaged_step = self.global_step
            self.model_ema(self)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        images = self.get_input(batch, self.image_key)
        scopes = {"val": nullcontext} | ({"val_ema": self.ema_scope} if self.use_ema else {})
        for split, scope in scopes.items():
            with scope():
                _, reconstructions = self._autoencoder_loss(images, self.generator_step, split)
                if self.adversarial:
                    _, terms = self.loss.discriminator_loss(images, reconstructions, self.generator_step)
                    self.log_dict({f"{split}/{name}": value for name, value in terms.items()}, batch_size=len(images))

    def configure_optimizers(self) -> Any:
        parts = [part for name, part in self.named_children() if name not in ("loss", "model_ema")]
        weights = [parameter for part in parts for parameter in part.parameters()]
        optimizers = [torch.optim.Adam(weights, lr=self.lr_g_factor * self.learning_rate, betas=(0.5, 0.9))]
        if self.adversarial:
            weights = self.loss.discriminator.parameters()
            optimizers.append(torch.optim.Adam(weights, lr=self.learning_rate, betas=(0.5, 0.9)))
        if self.scheduler_config is None:
            return optimizers
        schedule = make_factor(self.scheduler_config)
        lambdas = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=schedule) for optimizer in optimizers]
        return optimizers, [{"scheduler": one, "interval": "step", "frequency": 1} for one in lambdas]

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Tensor], only_inputs: bool = False, plot_ema: bool = False, split: str = "train"
    ) -> dict[str, Tensor]:
        """Images `[B, 3, H, W]` by name: inputs, reconstructions, and with `plot_ema` those of the averages."""
        images = self.get_input(batch, self.image_key).to(self.device)
        shown = {"inputs": self.to_rgb(images)}
        if not only_inputs:
            shown["reconstructions"] = self.to_rgb(self.reconstruct(images, split)[0])
            if plot_ema:
                with self.ema_scope():
                    shown["reconstructions_ema"] = self.to_rgb(self.reconstruct(images, split)[0])
        return shown

    def to_rgb(self, x: Tensor) -> Tensor:
        """Images as they are; more than 3 channels `[B, L, H, W]` are projected to colours in [-1, 1]."""
        if x.shape[1] <= 3:
            return x
        if not hasattr(self, "colorize"):
            raise ValueError(f"images have {x.shape[1]} channels; set colorize_nlabels to show them")
        x = F.conv2d(x, self.colorize)  # [B, 3, H, W]
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0
