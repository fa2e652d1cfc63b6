"""The package's version."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("megatron-gpt2")
except PackageNotFoundError:  # run from a source tree that was not installed
    VERSION = "0.0.0"
