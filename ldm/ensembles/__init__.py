"""Ensembles: members that share a base model, their networks, their classes, and their files."""

from ldm.ensembles.classes import Classes, Groups
from ldm.ensembles.heads import ClassTables, MemberRecord
from ldm.ensembles.members import MemberNetwork, Members, SingleMember
from ldm.ensembles.storage import Ensemble, read_ensemble, read_published, write_ensemble

__all__ = [
    "ClassTables",
    "Classes",
    "Ensemble",
    "Groups",
    "MemberNetwork",
    "MemberRecord",
    "Members",
    "SingleMember",
    "read_ensemble",
    "read_published",
    "write_ensemble",
]
