"""Packages of fastuft; the rest of the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["fastuft", "fastuft.*"]), "fastuft.kernels"])
