"""The networks of EDM (Karras et al. 2022, arXiv 2206.00364) under their published constructors and key names."""

from ldm.modules.edm.dhariwal import DhariwalUNet
from ldm.modules.edm.song import SongUNet

__all__ = ["DhariwalUNet", "SongUNet"]
