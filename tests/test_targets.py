"""Targets that YAML files name: those of configs/ exist as they stand, and those of the first version still resolve."""

import sys
from pathlib import Path

import pytest
import yaml

import main
from ldm.trust import is_admitted
from ldm.util import MOVED_MODULES, RENAMED_TARGETS, TARGET_ALIASES, get_obj_from_str

FILES = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))

# Every class that a config, a document or a saved run of the first version names as a target.
FIRST_VERSION = [
    "ldm.data.augmentation.NonLeaky",
    "ldm.data.base.Crop",
    "ldm.data.base.Flip",
    "ldm.data.cifar.CIFAR10",
    "ldm.data.digits.Digits",
    "ldm.data.folder.ImageFolder",
    "ldm.data.idx.FashionMNIST",
    "ldm.data.idx.KMNIST",
    "ldm.data.idx.MNIST",
    "ldm.data.imagenet.ImageNetTrain",
    "ldm.data.imagenet.ImageNetValidation",
    "ldm.data.omniglot.Omniglot",
    "ldm.data.subsets.ComponentSubset",
    "ldm.data.tiny_imagenet.TinyImageNet",
    "ldm.lr_scheduler.LambdaLinearScheduler",
    "ldm.models.autoencoder.AutoencoderKL",
    "ldm.models.autoencoder.IdentityFirstStage",
    "ldm.models.autoencoder.VQModel",
    "ldm.models.autoencoder.VQModelInterface",
    "ldm.models.diffusion.classifier.NoisyClassifier",
    "ldm.models.diffusion.ddim.DDIMSampler",
    "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.models.diffusion.plms.PLMSSampler",
    "ldm.modules.ddpmpp.UNet",
    "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel",
    "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "ldm.modules.dit.DiT",
    "ldm.modules.encoders.modules.AugmentationLabels",
    "ldm.modules.encoders.modules.ClassEmbedder",
    "ldm.modules.losses.KLLoss",
    "ldm.modules.losses.VQLoss",
    "torch.nn.Identity",
]
# Those that have another name or place now.
MOVED = {
    "ldm.models.diffusion.affine.CosinePath": "ldm.diffusion.affine.CosineSchedule",
    "ldm.models.diffusion.affine.LinearAlphaPath": "ldm.diffusion.affine.LinearAlphaSchedule",
    "ldm.models.diffusion.affine.PolynomialPath": "ldm.diffusion.affine.PolynomialSchedule",
    "ldm.models.diffusion.ddpm.Layout2ImgDiffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.models.diffusion.learned_variance.LearnedVariance": "ldm.diffusion.learned_variance.LearnedVariance",
    "ldm.models.diffusion.path.EDMPath": "ldm.diffusion.schedule.EDMSchedule",
    "ldm.models.diffusion.path.FlowPath": "ldm.diffusion.schedule.FlowSchedule",
    "ldm.models.diffusion.path.LinearVPPath": "ldm.diffusion.schedule.LinearVPSchedule",
    "ldm.models.diffusion.path.VEPath": "ldm.diffusion.schedule.VESchedule",
    "ldm.models.diffusion.path.VPPath": "ldm.diffusion.schedule.VPSchedule",
    "ldm.models.diffusion.times.LogNormalNoise": "ldm.diffusion.training_times.LogNormalNoise",
    "ldm.models.diffusion.times.UniformTimes": "ldm.diffusion.training_times.UniformTimes",
    "ldm.modules.losses.LPIPSWithDiscriminator": "ldm.modules.losses.KLLoss",
    "ldm.modules.losses.contperceptual.DummyLoss": "torch.nn.Identity",
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": "ldm.modules.losses.KLLoss",
    "ldm.opened.trunk.TrunkFeatures": "ldm.pipelines.features.BackboneFeatures",
    "main.CUDACallback": "ldm.training.callbacks.CUDACallback",
    "main.DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "main.ImageLogger": "ldm.training.callbacks.ImageLogger",
    "main.LearningRateMonitor": "pytorch_lightning.callbacks.LearningRateMonitor",
    "main.SetupCallback": "ldm.training.callbacks.SetupCallback",
    "main.WrappedDataset": "ldm.data.module.WrappedDataset",
    "taming.modules.losses.vqperceptual.DummyLoss": "torch.nn.Identity",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "ldm.modules.losses.VQLoss",
}


def targets(node):
    """The targets of a plain config, at every depth."""
    if isinstance(node, dict):
        yield from [node["target"]] if isinstance(node.get("target"), str) else []
        yield from (found for value in node.values() for found in targets(value))
    if isinstance(node, list):
        yield from (found for value in node for found in targets(value))


def names(target):
    return target.rpartition(".")[2]


def test_every_target_of_the_first_version_resolves():
    for target in FIRST_VERSION:
        assert get_obj_from_str(target).__name__ == names(target)
    for old, new in MOVED.items():
        assert get_obj_from_str(old) is get_obj_from_str(new), old
        assert get_obj_from_str(new).__name__ == names(new)


def test_no_alias_is_left_out_of_the_list():
    faces = {old for old in TARGET_ALIASES if old.startswith("taming.data.faceshq.")}
    assert set(TARGET_ALIASES) - faces <= set(MOVED)
    assert set(MOVED_MODULES) == {old.rpartition(".")[0] for old in MOVED if not old.startswith(("main", "taming"))} - {
        "ldm.models.diffusion.ddpm",
        "ldm.modules.losses",
        "ldm.modules.losses.contperceptual",
    }
    assert set(RENAMED_TARGETS) <= {names(old) for old in MOVED}


def test_data_that_was_never_published_says_what_takes_its_place():
    """latent-diffusion's own files of faces name them, and a file that travels may."""
    for name in ("FFHQTrain", "CelebAHQValidation"):
        target = f"taming.data.faceshq.{name}"
        assert is_admitted(target) and not is_admitted(f"taming.data.{name}")
        with pytest.raises(ValueError, match="data sets whose code was not published: name one in its place"):
            get_obj_from_str(target)


def test_configs_name_what_exists_by_its_own_name():
    """Old names are for old files; `main.DataModuleFromConfig` is latent-diffusion's word, and stays."""
    found = {target for file in FILES for target in targets(yaml.safe_load(file.read_text()))}
    assert len(found) > 25
    assert {target for target in found if target in MOVED} == {"main.DataModuleFromConfig"}
    for target in found:
        assert get_obj_from_str(target).__name__ == names(target)


@pytest.mark.parametrize("name", [old.removeprefix("main.") for old in MOVED if old.startswith("main.")])
def test_main_of_the_checkout_has_what_configs_look_for_there(name):
    assert getattr(main, name) is get_obj_from_str(f"main.{name}")


def test_another_main_beside_a_config_is_still_found(tmp_path, monkeypatch):
    """A target of somebody's own main.py is no alias."""
    (tmp_path / "main.py").write_text("class Mine:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "main")
    assert get_obj_from_str("main.Mine").__name__ == "Mine"
    assert sys.modules["main"].__file__ == str(tmp_path / "main.py")
    assert get_obj_from_str("main.ImageLogger").__module__ == "ldm.training.callbacks"
