"""The version of this package, for rooms that must not import the package itself."""

VERSION = "0.1.0"
