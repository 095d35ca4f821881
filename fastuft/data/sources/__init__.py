"""Image sources other than plain files: tar shards, parquet and Arrow tables, and objects behind URLs."""

from fastuft.data.sources.locations import PACKED_SUFFIXES, Found, is_url_or_packed, open_location, packed_in
from fastuft.data.sources.urls import listings_agreed

__all__ = ["PACKED_SUFFIXES", "Found", "is_url_or_packed", "listings_agreed", "open_location", "packed_in"]
