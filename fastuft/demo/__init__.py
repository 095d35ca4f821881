"""The whole job on data that ships with the installed libraries: glyphs as source, handwritten digits as target."""

from fastuft.demo.images import write_demo_images
from fastuft.demo.run import run_demo

__all__ = ["run_demo", "write_demo_images"]
