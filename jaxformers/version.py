"""The version of the package, which the build and the command line read as well."""

__version__ = "0.1.0"
