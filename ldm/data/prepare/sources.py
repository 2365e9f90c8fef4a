"""Published data sets and networks: their files, their addresses, and what is known of their content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.data.prepare import ffhq as prepare_ffhq
from ldm.data.prepare.archives import unpack
from ldm.data.prepare.download import fetch
from ldm.data.prepare.imagenet import MD5, TARS, unpack_imagenet
from ldm.data.prepare.lsun import ARCHIVES, library, prepare_tower
from ldm.data.prepare.pages import drive_url

OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
# Config of configs/guided-diffusion -> the address of its released weights (github.com/forever208/ADM-ES, openai).
ADM = {
    "cifar10-32": drive_url("1m-a3WqfpMTibzuTC2om046yWQr20GT0I"),
    "lsun-tower-64": drive_url("1_7gLg44qP4v5bgJNvSo65MtXDZ3xXW39"),
    "ffhq-128": drive_url("1P5Kgyyqp4Zv1RiW116MgBmeX299bGcDw"),
    "imagenet-64": f"{OPENAI}/64x64_diffusion.pt",
    "imagenet-128": f"{OPENAI}/128x128_diffusion.pt",
    "imagenet-128-classifier": f"{OPENAI}/128x128_classifier.pt",
}
# CelebA's files on its publisher's Google Drive, with the checksums of torchvision.
CELEBA_FILES = {
    "list_eval_partition.txt": ("0B7EVK8r0v71pY0NSMzRuSXJEVkk", "d32c9cbf5e040fd4025c592c306e6668"),
    "list_attr_celeba.txt": ("0B7EVK8r0v71pblRyaVFSWGxPY0U", "75e246fa4810816ffd6ee81facbd244c"),
    "identity_CelebA.txt": ("1_ee_0u7vcNLOfNLegJRHmolfH5ICW-XS", "32bd1bd63d3c78cd57e08160ec5ed1e2"),
    "img_align_celeba.zip": ("0B7EVK8r0v71pZjFTYXZWM3FlRnM", "00d2c5bc6d35e252742224ab0c1e8fcb"),
}
# Terms that a data set comes with.
TERMS = {
    "celeba": "CelebA is for non-commercial research only (mmlab.ie.cuhk.edu.hk/projects/CelebA.html)",
    "ffhq": "FFHQ is not for commercial use (CC BY-NC-SA 4.0, github.com/NVlabs/ffhq-dataset)",
    "imagenet": "ImageNet is for non-commercial research and education only (image-net.org/download)",
}
LATENT_DIFFUSION = "https://ommer-lab.com/files/latent-diffusion"
# Released zip of latent-diffusion, by its name -> the config of what it holds (its scripts/download_models.sh and
# download_first_stages.sh).
ZOO = {
    "celeba": "latent-diffusion/celebahq-ldm-vq-4",
    "ffhq": "latent-diffusion/ffhq-ldm-vq-4",
    "lsun_churches": "latent-diffusion/lsun_churches-ldm-kl-8",
    "lsun_bedrooms": "latent-diffusion/lsun_bedrooms-ldm-vq-4",
    "cin": "latent-diffusion/cin-ldm-vq-f8",
    "text2img": "latent-diffusion/text2img256",
    "layout2img_model": "latent-diffusion/layout2img-openimages256",
    "sr_bsr": "latent-diffusion/bsr_sr",
    "inpainting_big": "latent-diffusion/inpainting_big",
    "semantic_synthesis256": "latent-diffusion/semantic_synthesis256",
    "semantic_synthesis": "latent-diffusion/semantic_synthesis512",
    "kl-f4": "autoencoder/autoencoder_kl_64x64x3",
    "kl-f8": "autoencoder/autoencoder_kl_32x32x4",
    "kl-f16": "autoencoder/autoencoder_kl_16x16x16",
    "kl-f32": "autoencoder/autoencoder_kl_8x8x64",
    "vq-f4-noattn": "autoencoder/vq-f4-noattn",
    "vq-f8": "autoencoder/vq-f8",
    "vq-f8-n256": "autoencoder/vq-f8-n256",
    "vq-f16": "autoencoder/vq-f16",
}
# Zips that lie elsewhere than the others.
ZOO_ELSEWHERE = {
    "vq-f4-noattn": "https://heibox.uni-heidelberg.de/f/9c6681f64bb94338a069/?dl=1",
    "vq-f16": "https://heibox.uni-heidelberg.de/f/0e42b04e2e904890a9b6/?dl=1",
}
# What --only chooses from, by data set.
CHOICES = {"adm": tuple(ADM), "latent-diffusion": tuple(ZOO)}
IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


@dataclass(frozen=True)
class PublishedFile:
    """A published file.

    Attributes:
        address: where it is, without its name.
        name: its name.
        size: its size in bytes, where it is known.
        md5: its checksum, where it is known.
        folder: where it goes below the data set's own folder.
        url: the whole address, where it does not end in the name.
    """

    address: str
    name: str
    size: int | None = None
    md5: str | None = None
    folder: str = ""
    url: str = ""


def list_idx_files(address: str, *checksums: str) -> list[PublishedFile]:
    """Return the four files of a data set of the MNIST family."""
    return [PublishedFile(address, name, md5=md5) for name, md5 in zip(IDX_FILES, checksums, strict=True)]


SOURCES: dict[str, list[PublishedFile]] = {
    "mnist": list_idx_files(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": list_idx_files(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "kmnist": list_idx_files(
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist",
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
    "cifar10": [
        PublishedFile(
            "https://www.cs.toronto.edu/~kriz",
            "cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
        )
    ],
    "cifar100": [
        PublishedFile(
            "https://www.cs.toronto.edu/~kriz",
            "cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
        )
    ],
    "celeba": [
        PublishedFile("", name, md5=md5, url=drive_url(identity)) for name, (identity, md5) in CELEBA_FILES.items()
    ],
    # Its md5 is that of avalanche-lib; its publisher gives none.
    "tiny-imagenet": [
        PublishedFile("http://cs231n.stanford.edu", "tiny-imagenet-200.zip", md5="90528d7ca1a48142e341f4ef8d21d0de")
    ],
    "imagenet": [PublishedFile("", name, md5=MD5[name]) for name in TARS],
    "pretrained": [
        PublishedFile(LATENT_DIFFUSION, "vq-f4.zip", folder="vae"),
        PublishedFile(
            f"{LATENT_DIFFUSION}/nitro/cin",
            "model.ckpt",
            size=1_827_378_153,
            folder="cin256-v2",
        ),
    ],
    "latent-diffusion": [
        PublishedFile(LATENT_DIFFUSION, f"{name}.zip", folder=name, url=ZOO_ELSEWHERE.get(name, "")) for name in ZOO
    ],
    "adm": [PublishedFile("", f"{name}.pt", url=url) for name, url in ADM.items()],
    "lsun-tower": [
        PublishedFile("http://dl.yf.io/lsun/scenes", f"{name}_lmdb.zip", size) for name, size in ARCHIVES.items()
    ],
    "ffhq": [PublishedFile("", url=drive_url(prepare_ffhq.LIST_ID), **prepare_ffhq.LIST)],  # type: ignore[arg-type]
}


def fetch_files(dataset: str, folder: Path, mirror: str | None, only: Sequence[str] = ()) -> list[Path]:
    """Fetch the files of a data set into `folder`, all or those whose names without suffix are in `only`."""
    paths = []
    for source in SOURCES[dataset]:
        if only and Path(source.name).stem not in only:
            continue
        named = f"{(mirror or source.address).rstrip('/')}/{source.name}"
        url = source.url if source.url and not mirror else named
        paths.append(fetch(url, folder / source.folder / source.name, source.size, source.md5))
    return paths


def prepare_images(dataset: str, folder: Path, mirror: str | None) -> list[Path]:
    """Fetch a data set and unpack its archives beside them; idx files and CelebA's zip are read as they are."""
    paths = fetch_files(dataset, folder, mirror)
    for path in paths:
        if path.name not in (*IDX_FILES, *CELEBA_FILES):
            unpack(path, folder)
    return paths


def prepare_imagenet(folder: Path, mirror: str | None) -> list[Path]:
    """Unpack ImageNet's tars, fetched by the user after a login, or here from a mirror."""
    if mirror:
        fetch_files("imagenet", folder, mirror)
    return unpack_imagenet(folder, verify=not mirror)  # what came from a mirror was verified on arrival


def prepare_lsun(folder: Path, mirror: str | None) -> list[Path]:
    """Fetch LSUN's towers, unpack the databases, and write their pictures as files."""
    library()  # before hours of downloading
    for path in fetch_files("lsun-tower", folder, mirror):
        unpack(path, folder)
    return prepare_tower(folder)


def prepare_faces(folder: Path, mirror: str | None) -> list[Path]:
    """Fetch FFHQ's list and every thumbnail it names; a mirror holds thumbnails128x128/ below it."""
    (listing,) = fetch_files("ffhq", folder, mirror)

    def mirrored(entry: dict[str, str]) -> str:
        return f"{str(mirror).rstrip('/')}/{entry['file_path']}"

    prepare_ffhq.fetch_thumbnails(folder, listing, mirrored if mirror else prepare_ffhq.published_address)
    return [folder / "thumbnails128x128"]
