"""Places of images beside plain files: tar shards, tables, and objects behind URLs."""

from fastuft.data.sources.places import PACKED_SUFFIXES, Place, is_place, open_place, packed_in

__all__ = ["PACKED_SUFFIXES", "Place", "is_place", "open_place", "packed_in"]
