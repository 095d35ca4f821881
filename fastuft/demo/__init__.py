"""The whole job on data bundled with the installed libraries: glyphs as the source, handwritten digits as the target."""

from fastuft.demo.images import write_demo_images
from fastuft.demo.run import run_demo

__all__ = ["run_demo", "write_demo_images"]
