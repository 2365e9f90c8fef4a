"""Fetch data sets and pretrained networks from their published addresses, verify and unpack them.

A download that broke off is resumed; a file that is there and correct is used; no file of yours is deleted or
overwritten. ImageNet needs a login: the command says what to download, and unpacks it then.

Examples:
  bash prep_data.sh --dataset mnist
  bash prep_data.sh --dataset cifar10,fashion-mnist --root data
  bash prep_data.sh --dataset mnist --url https://example.org/mirror/mnist
  bash prep_data.sh --dataset imagenet
  bash prep_data.sh --dataset pretrained
  bash prep_data.sh --dataset adm --only cifar10-32,imagenet-128-classifier
  bash prep_data.sh --dataset lsun-tower,ffhq
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.checkpoint import load_state_dict, matches
from ldm.cli import HelpFormatter, run_script
from ldm.data.prepare import ffhq as prepare_ffhq
from ldm.data.prepare.archives import check_whole, unpack
from ldm.data.prepare.download import fetch
from ldm.data.prepare.imagenet import MD5, TARS, unpack_imagenet
from ldm.data.prepare.lsun import ARCHIVES, library, prepare_tower
from ldm.data.prepare.pages import drive_url
from ldm.training.config import load_config
from ldm.util import instantiate_from_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
KEYS_FILE = CONFIGS / "latent-diffusion" / "cin256-v2.keys.txt"
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
FIRST_STAGE = "first_stage_model."
# Beside the model's own: averaged copies of its weights, and the loss of a first stage's training.
EXTRA_KEYS = ("model_ema.*", "loss.*")
IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


@dataclass(frozen=True)
class Source:
    """A published file: its address without the name, its name, and what is known of its content."""

    address: str
    name: str
    size: int | None = None  # bytes
    md5: str | None = None
    folder: str = ""  # below the data set's own
    url: str = ""  # the whole address, where it does not end in the name


def idx_sources(address: str, *checksums: str) -> list[Source]:
    """Return the four files of a data set of the MNIST family."""
    return [Source(address, name, md5=md5) for name, md5 in zip(IDX_FILES, checksums, strict=True)]


SOURCES: dict[str, list[Source]] = {
    "mnist": idx_sources(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": idx_sources(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "kmnist": idx_sources(
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist",
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
    "cifar10": [
        Source(
            "https://www.cs.toronto.edu/~kriz",
            "cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
        )
    ],
    # Its md5 is that of avalanche-lib; its publisher gives none.
    "tiny-imagenet": [
        Source("http://cs231n.stanford.edu", "tiny-imagenet-200.zip", md5="90528d7ca1a48142e341f4ef8d21d0de")
    ],
    "imagenet": [Source("", name, md5=MD5[name]) for name in TARS],
    "pretrained": [
        Source("https://ommer-lab.com/files/latent-diffusion", "vq-f4.zip", folder="vae"),
        Source(
            "https://ommer-lab.com/files/latent-diffusion/nitro/cin",
            "model.ckpt",
            size=1_827_378_153,
            folder="cin256-v2",
        ),
    ],
    "adm": [Source("", f"{name}.pt", url=url) for name, url in ADM.items()],
    "lsun-tower": [Source("http://dl.yf.io/lsun/scenes", f"{name}_lmdb.zip", size) for name, size in ARCHIVES.items()],
    "ffhq": [Source("", url=drive_url(prepare_ffhq.LIST_ID), **prepare_ffhq.LIST)],
}
# Networks rather than images: they go below --models_root.
NETWORKS = {"pretrained": "", "adm": "adm"}


def fetch_all(dataset: str, folder: Path, mirror: str | None, only: Sequence[str] = ()) -> list[Path]:
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
    """Fetch a data set and unpack its archives beside them; idx files are read as they are."""
    paths = fetch_all(dataset, folder, mirror)
    for path in paths:
        if path.name not in IDX_FILES:
            unpack(path, folder)
    return paths


def prepare_imagenet(dataset: str, folder: Path, mirror: str | None) -> list[Path]:
    """Unpack ImageNet's tars, fetched by the user after a login, or here from a mirror."""
    if mirror:
        fetch_all(dataset, folder, mirror)
    return unpack_imagenet(folder, verify=not mirror)  # what came from a mirror was verified on arrival


def prepare_networks(dataset: str, folder: Path, mirror: str | None) -> list[Path]:
    """Fetch the released ImageNet model and its first stage, and check their keys and shapes."""
    archive, model = fetch_all(dataset, folder, mirror)
    expected = read_keys(KEYS_FILE)
    check_keys(model, expected)
    networks = [path for path in unpack(archive, archive.parent) if path.suffix == ".ckpt"]
    stage = {name.removeprefix(FIRST_STAGE): shape for name, shape in expected.items() if name.startswith(FIRST_STAGE)}
    for path in networks:
        check_keys(path, stage)
    return [model, *networks]


def read_keys(path: Path) -> dict[str, tuple[int, ...]]:
    """Read {key: shape} from lines of `key 64x3x3x3`."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {name: tuple(map(int, shape.split("x"))) for name, shape in pairs}


def check_keys(path: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Compare the keys and shapes of a checkpoint with the expected ones.

    Raises:
        ValueError: naming those that are missing, unknown, or of another shape, or if the file is damaged; it is left
            where it is.
    """
    check_whole(path)
    found = {name: tuple(value.shape) for name, value in load_state_dict(path).items()}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(name for name in found.keys() - expected.keys() if not matches(name, EXTRA_KEYS)),
        "of another shape": sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name]),
    }
    told = [f"{len(names)} {what} ({', '.join(names[:5])})" for what, names in faults.items() if names]
    if told:
        raise ValueError(
            f"{path} is not the released network: of {len(expected)} expected keys {'; '.join(told)}; "
            "move it away to fetch it anew"
        )
    print(f"{path}: all {len(expected)} keys and shapes as released")


def prepare_adm(dataset: str, folder: Path, mirror: str | None, only: Sequence[str] = ()) -> list[Path]:
    """Fetch released ADM models and check their keys and shapes against the networks of their configs."""
    paths = fetch_all(dataset, folder, mirror, only)
    for path in paths:
        spec = load_config([str(CONFIGS / "guided-diffusion" / f"{path.stem}.yaml")]).model
        spec = spec.params.unet_config if "unet_config" in spec.params else spec
        with torch.device("meta"):
            network = instantiate_from_config(spec)
        check_keys(path, {name: tuple(value.shape) for name, value in network.state_dict().items()})
    return paths


def prepare_lsun(dataset: str, folder: Path, mirror: str | None) -> list[Path]:
    """Fetch LSUN's towers, unpack the databases, and write their pictures as files."""
    library()  # before hours of downloading
    for path in fetch_all(dataset, folder, mirror):
        unpack(path, folder)
    return prepare_tower(folder)


def prepare_faces(dataset: str, folder: Path, mirror: str | None) -> list[Path]:
    """Fetch FFHQ's list and every thumbnail it names; a mirror holds thumbnails128x128/ below it."""
    (listing,) = fetch_all(dataset, folder, mirror)

    def mirrored(entry: dict) -> str:
        return f"{mirror.rstrip('/')}/{entry['file_path']}"

    prepare_ffhq.fetch_thumbnails(folder, listing, mirrored if mirror else prepare_ffhq.published_address)
    return [folder / "thumbnails128x128"]


PREPARE: dict[str, Callable[..., list[Path]]] = {
    "imagenet": prepare_imagenet,
    "pretrained": prepare_networks,
    "adm": prepare_adm,
    "lsun-tower": prepare_lsun,
    "ffhq": prepare_faces,
}


def dataset_names(text: str) -> list[str]:
    """Read a comma-separated list of data sets."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SOURCES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected one or more of {', '.join(SOURCES)}, got '{text}'")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare each data set asked for, and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--dataset", required=True, type=dataset_names, help=f"one or more, by commas: {', '.join(SOURCES)}"
    )
    parser.add_argument("--root", default="data", help="folder for the data sets; each has its own below it")
    parser.add_argument("--models_root", default="pretrained_models", help="folder for networks (pretrained, adm)")
    names = "of adm, only these: config names of configs/guided-diffusion, by commas"
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAME,..", help=names)
    parser.add_argument("--url", help="mirror that holds the published files of the one data set asked for")
    options = parser.parse_args(argv)
    if options.url and len(options.dataset) > 1:
        parser.error("--url goes with a single data set")
    if options.only and (options.dataset != ["adm"] or not set(options.only) <= set(ADM)):
        parser.error(f"--only goes with --dataset adm and takes names of {', '.join(ADM)}")
    for name in options.dataset:
        folder = Path(options.models_root, NETWORKS[name]) if name in NETWORKS else Path(options.root) / name
        more = {"only": options.only} if options.only else {}
        try:
            paths = PREPARE.get(name, prepare_images)(name, folder, options.url, **more)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: {error}") from error
        print(f"{name}: ready in {folder} ({', '.join(str(path.relative_to(folder)) for path in paths)})")


if __name__ == "__main__":
    run_script(main)
