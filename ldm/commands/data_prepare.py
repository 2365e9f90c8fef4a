"""`decu data prepare` (prep_data.sh): data sets and released networks from their published addresses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ldm.commands.failures import describe_failure
from ldm.options import option

# Networks rather than images: they go below --models_root, each into the folder named here.
NETWORKS = {"pretrained": "", "latent-diffusion": "", "adm": "adm"}
# What DECU's README asks for, and where its configs and its command line read ImageNet.
DECU_NEEDS = ("pretrained", "imagenet")
IMAGENET = "imagenet_data"


@dataclass(frozen=True)
class PrepareData:
    """Fetch data sets and pretrained networks from their published addresses, verify and unpack them.

    A download that broke off is resumed; a file that is there and correct is used; no file of yours is deleted or
    overwritten. ImageNet needs a login: the command says what to download, and unpacks it then.

    Without --dataset it fetches what DECU needs, the released ImageNet model with its first stage and ImageNet, into
    the folders that configs/latent-diffusion/cin256-v2.yaml reads.

    Examples:
      bash prep_data.sh
      bash prep_data.sh --dataset mnist
      bash prep_data.sh --dataset cifar10,fashion-mnist --root data
      bash prep_data.sh --dataset mnist --url https://example.org/mirror/mnist
      decu data prepare --dataset imagenet
      decu data prepare --dataset pretrained
      decu data prepare --dataset adm --only cifar10-32,imagenet-128-classifier
      decu data prepare --dataset latent-diffusion --only celeba,kl-f8
      decu data prepare --dataset lsun-tower,ffhq,celeba
    """

    dataset: Annotated[str | None, option(metavar="NAME,..", default="pretrained,imagenet")] = None
    """One or more, by commas: mnist, fashion-mnist, kmnist, cifar10, cifar100, tiny-imagenet, imagenet, pretrained,
    latent-diffusion, adm, lsun-tower, ffhq, celeba."""
    root: Annotated[str | None, option(metavar="DIR", default="data, and ImageNet in imagenet_data")] = None
    """The folder of the data sets; each has its own below it."""
    models_root: str = "pretrained_models"
    """The folder of networks (pretrained, latent-diffusion, adm)."""
    only: Annotated[str | None, option(metavar="NAME,..", default="all of them")] = None
    """Of adm or latent-diffusion, only these, by commas: names of configs in configs/guided-diffusion; names of
    latent-diffusion's zips (celeba, ffhq, lsun_churches, lsun_bedrooms, cin, text2img, layout2img_model, sr_bsr,
    inpainting_big, semantic_synthesis256, semantic_synthesis, kl-f4, kl-f8, kl-f16, kl-f32, vq-f4-noattn, vq-f8,
    vq-f8-n256, vq-f16)."""
    url: Annotated[str | None, option(metavar="URL", default="the published addresses")] = None
    """A mirror that holds the published files of the one data set asked for."""

    @property
    def names(self) -> list[str]:
        """The data sets that were asked for."""
        if self.dataset is None:
            return list(DECU_NEEDS)
        return [name.strip() for name in self.dataset.split(",") if name.strip()]

    @property
    def only_names(self) -> list[str]:
        """The networks of a set that were asked for; all where there are none."""
        return self.only.split(",") if self.only else []

    def run(self) -> list[Path]:
        """Prepare each data set, and say where it is; return the files.

        One that fails does not keep the others from being prepared.

        Raises:
            ValueError: for a name that is not published here, a file that is not as published, or options that
                exclude each other.
        """
        from ldm.data.prepare.sources import TERMS

        self._check()
        found, faults = [], []
        for name in self.names:
            folder = self._folder(name)
            try:
                paths = self._prepare(name, folder)
            except (ValueError, OSError) as error:
                faults.append(f"{name}: {describe_failure(error, self)}")
                continue
            listed = ", ".join(str(path.relative_to(folder)) for path in paths)
            print(f"{name}: ready in {folder} ({listed})")
            if name in TERMS:
                print(TERMS[name])
            found += paths
        if faults:
            raise ValueError("; ".join(faults))
        return found

    def _check(self) -> None:
        from ldm.data.prepare.sources import CHOICES, SOURCES

        unknown = [name for name in self.names if name not in SOURCES]
        if unknown or not self.names:
            raise ValueError(f"--dataset takes one or more of {', '.join(SOURCES)}; got '{self.dataset}'")
        if self.url and len(self.names) > 1:
            raise ValueError(f"--url goes with a single data set, got {len(self.names)}")
        choices = CHOICES.get(self.names[0], ()) if len(self.names) == 1 else ()
        if self.only_names and not set(self.only_names) <= set(choices):
            sets = "; ".join(f"of {name}: {', '.join(known)}" for name, known in CHOICES.items())
            raise ValueError(
                f"--only goes with --dataset {' or '.join(CHOICES)} alone and takes {sets}; got '{self.only}'"
            )

    def _folder(self, name: str) -> Path:
        """Return where a data set or the networks of a name go."""
        if name in NETWORKS:
            return Path(self.models_root, NETWORKS[name])
        if self.root is None and name == "imagenet":
            return Path(IMAGENET)
        return Path(self.root or "data") / name

    def _prepare(self, name: str, folder: Path) -> list[Path]:
        """Fetch, verify and unpack one data set or the networks of one name."""
        from ldm.data.prepare import sources
        from ldm.training.released import prepare_adm, prepare_latent_diffusion, prepare_networks

        if name == "adm":
            return prepare_adm(folder, self.url, self.only_names, report=print)
        if name == "latent-diffusion":
            return prepare_latent_diffusion(folder, self.url, self.only_names, report=print)
        if name == "pretrained":
            return prepare_networks(folder, self.url, report=print)
        if name == "imagenet":
            return sources.prepare_imagenet(folder, self.url)
        if name == "lsun-tower":
            return sources.prepare_lsun(folder, self.url)
        if name == "ffhq":
            return sources.prepare_faces(folder, self.url)
        return sources.prepare_images(name, folder, self.url)
