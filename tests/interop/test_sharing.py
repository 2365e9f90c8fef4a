"""Folders to share: they open alone and run nothing, their cards say what is known, and a stand-in hub carries them."""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from ldm import Branching, Sampling, load_ensemble, load_model
from ldm.commands.line import run_command
from ldm.data.digits import Digits
from ldm.interop import sharing
from ldm.interop.cards import Card
from ldm.report.tables import write_csv
from ldm.training.runs import RunDirectory
from tests.comparisons import hide
from tests.conftest import tiny_config
from tests.ensembles import write_ensemble
from tests.pipelines.test_guidance_options import write_run

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub to make a repository, fill it, and fetch it."""

    def log_message(self, *_):
        """Say nothing."""

    def answer(self, content=b"", **headers):
        content = json.dumps(content).encode() if isinstance(content, (dict, list)) else content
        self.send_response(200)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"{self.server.address}/me/tiny"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/me/tiny/commit/{COMMIT}", "commitOid": COMMIT,
                         "success": True})  # fmt: skip
        else:
            self.answer({})

    def do_GET(self):
        name = unquote(self.path.partition("?")[0]).rpartition(f"/resolve/{COMMIT}/")[2]
        if name in self.server.files and "/resolve/" in self.path:
            content = self.server.files[name]
            etag = hashlib.sha256(content).hexdigest()
            self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        elif "/tree/" in self.path:
            sizes = {name: len(content) for name, content in self.server.files.items()}
            self.answer([{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()])
        else:
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer({"id": "me/tiny", "sha": COMMIT, "siblings": siblings, "private": False})

    do_HEAD = do_GET


@contextmanager
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("shared") / "2026-01-01T00-00-00_tiny")


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The folder of a model."""
    out = tmp_path_factory.mktemp("model") / "tiny"
    run_command("export", ["--run", str(run), "--to", "folder", "--out", str(out)])
    return out


def test_a_model_opens_from_its_folder_as_from_its_run(run, folder):
    sampling = Sampling(steps=3)
    one, other = load_model(run, sampling, device="cpu"), load_model(folder, sampling, device="cpu")
    torch.testing.assert_close(one.sample_latents([1, 2], [0, 1]), other.sample_latents([1, 2], [0, 1]))
    assert other.scale == 2.0  # guidance_scale of the config
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.yaml",
        "README.md",
        "record.json",
    }
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: decu-uncertainty") and f'load_model("{folder}")' in card
    assert "not measured" in card and "| guidance scale | 2.0 |" in card
    out = folder.parent / "images"
    run_command(
        "sample model", ["--run", str(folder), "--n", "2", "--steps", "2", "--out", str(out), "--device", "cpu"]
    )
    assert (out / "samples.npz").exists()


def test_the_card_counts_the_pictures_that_a_model_saw(tmp_path):
    run = RunDirectory(write_run(tmp_path / "2026-01-01T00-00-00_seen", loss_weight={"name": "min_snr", "gamma": 5}))
    for name, count in {"cat": 3, "dog": 1}.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8)).save(tmp_path / "pictures" / name / f"{number}.png")
    params = {"root": str(tmp_path / "pictures"), "split": "all", "image_size": 8}
    train = {"target": "ldm.data.folder.ImageFolder", "params": params}
    run.write_config(OmegaConf.merge(run.config(), {"data": {"params": {"train": train}}}), "project")
    out = tmp_path / "out"
    run_command("export", ["--run", str(run.path), "--to", "folder", "--out", str(out)])
    card = (out / "README.md").read_text()
    assert "| 3 | 1 | cat |" in card and "| 1 | 1 | dog |" in card
    assert "| loss weight | min_snr, gamma 5 |" in card and str(tmp_path / "pictures") not in card


def test_a_card_is_written_for_people():
    """The command can be typed again, and of many numbers of images the range is said."""
    record = {"command": ["decu", "export", "--out", "a b"]}
    assert "- command: `decu export --out 'a b'`" in Card("t", "p", {}, record=record).render()
    table = [{"class": 0, "name": 0, "bin": 0, "mi_mean": 0.5, "mi_low": None, "mi_high": None}]
    card = Card("t", "p", {}, {"bins": {0: "all", 1: 10, 2: 9}}, 2, table).render()
    assert "| 0 | 0 | 0.5 |  to  |" in card
    assert card.index("| 9 | 1 |") < card.index("| 10 | 1 |") < card.index("| all | 1 |")
    many = Card("t", "p", {}, {"bins": {label: label + 1 for label in range(31)}}).render()
    assert "31 classes have 1 to 31 training images each, median 16." in many
    many = Card("t", "p", {}, {"bins": {label: label + 1 for label in range(30)} | {30: "all"}}).render()
    assert "31 classes have 1 to all training images each, median 16." in many


def test_an_ensemble_needs_no_other_file(tmp_path):
    source = write_ensemble(tmp_path, members=2)
    rows = [{"class": 0, "name": "zero", "bin": "1", "mi_mean": 0.51, "mi_low": 0.42, "mi_high": 0.63}]
    (source / "samps_uncs_branch0").mkdir()
    write_csv(source / "samps_uncs_branch0" / "uncertainty.csv", rows, ["mi: nats"])
    out = tmp_path / "apart" / "tiny"
    run_command("export", ["--run", str(source), "--to", "folder", "--out", str(out)])
    (tmp_path / "trunk.ckpt").rename(tmp_path / "gone.ckpt")
    shared = load_ensemble(out, Sampling(steps=2), Branching(step=0), device="cpu")
    whole = load_ensemble(source, Sampling(steps=2), Branching(step=0), pretrained=tmp_path / "gone.ckpt", device="cpu")
    torch.testing.assert_close(shared.member_latents([3], [0]), whole.member_latents([3], [0]))
    assert {path.suffix for path in out.iterdir()} == {".yaml", ".safetensors", ".md", ".json"}
    card = (out / "README.md").read_text()
    assert "| zero | 1 | 0.51 | 0.42 to 0.63 |" in card
    assert "| 1 | 4 | name0, name3, name6, name9 |" in card and "load_ensemble(" in card


def test_the_card_of_an_ensemble_says_how_its_numbers_follow_the_images(tmp_path):
    """As `decu uncertainty classes` measured it; without bins the members saw all of the data, which are counted."""
    source = write_ensemble(tmp_path)
    run_command("uncertainty classes", ["--path", str(source), "--n", "2", "--device", "cpu"])
    words = next(source.rglob("summary.md")).read_text()
    out = tmp_path / "apart"
    run_command("export", ["--run", str(source), "--to", "folder", "--out", str(out)])
    card = (out / "README.md").read_text()
    spearman, auroc = (
        words.partition(f"{name}(")[2].partition("\n")[0].partition(" = ")[2] for name in ("Spearman", "AUROC")
    )
    assert f"rank correlation with the number of images: {spearman.partition(' (')[0]}; ties cap it at -0." in card
    assert f"- AUROC of classes with 1, 10 images against those with all: {auroc}\n" in card
    digits = {"target": "ldm.data.digits.Digits", "params": {"split": "train"}}
    config = {"model": tiny_config(), "data": {"params": {"train": digits}}}
    plain = write_ensemble(tmp_path / "plain", bins={}, config=config)
    run_command("export", ["--run", str(plain), "--to", "folder", "--out", str(tmp_path / "counted")])
    counts = Digits("train").labels.bincount().tolist()
    card = (tmp_path / "counted" / "README.md").read_text()
    assert all(f"| {count} | {counts.count(count)} |" in card for count in counts)
    assert "calibration of these numbers was not measured" in card


def test_the_hub_gives_back_what_it_was_sent(run, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub() as server:
        sharing.push_folder(folder, "me/tiny", endpoint=server.address)
        assert server.files.keys() == {path.name for path in folder.iterdir()}
        assert server.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        server.files["model.py"] = b"raise SystemExit"
        found = sharing.find_shared("hf://me/tiny", server.address)
    assert not (found / "model.py").exists()
    one, other = (load_model(path, Sampling(steps=2), device="cpu") for path in (found, run))
    torch.testing.assert_close(one.sample_latents([1], [0]), other.sample_latents([1], [0]))


def test_a_folder_runs_no_code_of_others(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"]["params"]["unet_config"]["target"] = "os.system"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"names os\.system, which is no class of this project"):
        load_model(copy, device="cpu")


def test_configs_lose_what_belongs_to_one_machine():
    config = {
        "paths": {"root": "/data"},
        "data": {"target": "x"},
        "model": {"params": {"a": "${paths.root}/b", "first": {"params": {"ckpt_path": "${paths.root}/f.ckpt"}}}},
        "uncertainty": {"n": 3},
    }
    found = sharing.make_shared_config(config)
    assert found == {"model": {"params": {"a": "/data/b", "first": {"params": {}}}}, "uncertainty": {"n": 3}}


def test_what_cannot_be_shared_is_refused(run, folder, tmp_path, monkeypatch, capsys):
    for words, reason in (
        (["--push_to_hub", "me/tiny"], "add --to folder"),
        (["--to", "folder", "--private"], "give its OWNER/NAME"),
        (["--to", "folder", "--push_to_hub", "tiny"], "OWNER/NAME, got 'tiny'"),
    ):
        with pytest.raises(SystemExit, match=reason):
            run_command("export", ["--run", str(run), "--out", str(tmp_path / "out.ckpt"), *words])
    with pytest.raises(SystemExit, match="--overwrite"):
        run_command("export", ["--run", str(run), "--to", "folder", "--out", str(folder)])
    hide(monkeypatch, "huggingface_hub")
    with pytest.raises(ValueError, match=r"decu-uncertainty\[hub\]"):
        sharing.find_shared("hf://me/tiny")
    assert Path(sharing.find_shared("logs/tiny")) == Path("logs/tiny")
