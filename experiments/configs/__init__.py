"""One file per experiment; its docstring is its lab-book page."""

import importlib
import pkgutil

from experiments.config import Config, Study
from experiments.spaces import Comparison


def names() -> list[str]:
    """Return the names of all experiments."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_config(name: str) -> Config:
    """Return the settings of an experiment by name."""
    return _module(name).CONFIG


def load_study(name: str) -> Study:
    """Return the study of an experiment by name."""
    return _module(name).STUDY


def load_comparison(name: str) -> Comparison | None:
    """Return the comparison of an experiment by name, if it has one."""
    return getattr(_module(name), "COMPARISON", None)


def compared() -> list[str]:
    """Return the names of the experiments that have a comparison."""
    return [name for name in names() if load_comparison(name)]


def summary(name: str) -> str:
    """Return the first line of an experiment's lab-book page."""
    return (_module(name).__doc__ or "").partition("\n")[0]


def _module(name: str):
    if name not in names():
        raise ValueError(f"config must be one of {', '.join(names())}; got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
