"""Public code that parity tests run: imported, or read from a checkout; without it they skip."""

import importlib.util
import os
import pathlib
import warnings

import pytest


def imported(name):
    with warnings.catch_warnings():  # what they say at import is not ours to mend
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


def checkout(variable, repository, *parts):
    """The module at `parts` of the checkout that an environment variable names."""
    directory = os.environ.get(variable)
    path = pathlib.Path(directory or "", *parts)
    if not directory or not path.is_file():
        pytest.skip(f"{variable} names no checkout of github.com/{repository}")
    spec = importlib.util.spec_from_file_location(f"public_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module
