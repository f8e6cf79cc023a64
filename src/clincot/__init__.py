"""ClinCoT: medical vision-language models that look before they answer."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("clincot")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
