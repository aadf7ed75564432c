"""Classes that are made at run time out of others, and can be pickled nevertheless.

Pickle finds a class by its module and name, where one that was made is not to be found in another
process. One of these is pickled as the function that made it and what it was made of.
"""

import copyreg
from abc import ABCMeta
from collections.abc import Callable
from typing import Any


class MadeClass(type):
    """The type of such a class."""


class MadeAbstractClass(MadeClass, ABCMeta):
    """The type of such a class whose bases are abstract ones."""


def make_class(
    maker: Callable[[Any], Any], base: Any, name: str, bases: tuple[type, ...], **attributes: Any
) -> Any:
    """A class of the given name and bases.

    Args:
        maker: a function at the top of a module that gives this very class for `base`.
        base: what it is made of.
        name: of the class.
        bases: of the class.
        attributes: of the class.
    """
    abstract = any(isinstance(given, ABCMeta) for given in bases)
    kind = MadeAbstractClass if abstract else MadeClass
    recipe = (maker, (base,))
    return kind(name, bases, {"__module__": maker.__module__, "_recipe": recipe, **attributes})


def made_of(made: Any) -> Any:
    """What a class, or one that it is a subclass of, was made of."""
    return made._recipe[1][0]


def _reduce(made: type) -> Any:
    # A subclass inherits the recipe, but was not made by it.
    return made.__dict__.get("_recipe", made.__qualname__)


copyreg.pickle(MadeClass, _reduce)
copyreg.pickle(MadeAbstractClass, _reduce)
