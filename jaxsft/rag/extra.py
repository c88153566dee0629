"""The packages that only retrieval needs, imported where they are used."""

import importlib
from types import ModuleType

from jaxsft.run import RunError


def need(module: str) -> ModuleType:
    """Imports a package of the `retrieval` extra.

    Raises:
      RunError: it is not installed.

    Example:
      >>> need("nowhere_to_be_found")
      Traceback (most recent call last):
      ...
      jaxsft.run.RunError: retrieval needs the package nowhere_to_be_found; install it with: pip install "jaxsft[rag]"
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name and not module.startswith(error.name):
            raise
        raise RunError(f'retrieval needs the package {module}; install it with: pip install "jaxsft[rag]"') from None
