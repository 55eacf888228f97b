"""Bayesian vision transformers in Pyro with a likelihood-guided Ising mask posterior.

The public names stand in ``__init__.pyi`` and are loaded when first used: importing the package is quick, and so is the
help of every script.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
