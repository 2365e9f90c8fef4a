"""What pyproject.toml cannot say: packages are found, and the folder configs/ ships as the package `ldm.configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ldm", "ldm.*"]), "ldm.configs"],
    package_dir={"ldm.configs": "configs"},
    package_data={
        "ldm": ["py.typed"],
        "ldm.training": ["templates/*.j2"],
        "ldm.report": ["templates/*.j2"],
        "ldm.configs": ["**/*.yaml", "**/*.txt"],
    },
)
