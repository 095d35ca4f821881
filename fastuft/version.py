"""The version of this package, for rooms that must not import the package's own face."""

VERSION = "0.1.0"
