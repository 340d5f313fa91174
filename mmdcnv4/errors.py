# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Errors in what the user gave: their message says what is wrong, where, and what to do.

Everything else that is raised is a fault of a program, and keeps its type and its traceback. The
subclasses are what Python itself would raise, too, so that `except ValueError` goes on working.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Optional, TypeVar, cast

_Function = TypeVar('_Function', bound=Callable[..., Any])


class UserError(RuntimeError):
    """An error in what the user gave; the tools of this package print its message alone."""


class InvalidValue(UserError, ValueError):
    """An argument, an entry of a config or a file has a value that is not allowed."""


class InvalidType(UserError, TypeError):
    """An argument or an entry of a config has another type than it must have."""


class MissingKey(UserError, KeyError):
    """An entry of a file that the user named is not there."""

    def __str__(self) -> str:
        return RuntimeError.__str__(self)  # a KeyError would put quotes around its message


class MissingFile(UserError, FileNotFoundError):
    """A file that the user named is not there."""


def user_arguments(name: Optional[str] = None) -> Callable[[_Function], _Function]:
    """Makes what a constructor says of its arguments a user error; for classes of configs.

    The checks themselves also serve programs without a config, and raise the plain classes.

    Args:
        name: of the class in a config, where it is another one than in Python.
    """
    def decorate(init: _Function) -> _Function:
        parameters = inspect.signature(init).parameters
        takes_all = any(value.kind is value.VAR_KEYWORD for value in parameters.values())

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            unknown = [] if takes_all else sorted(set(kwargs) - set(parameters))
            if unknown:
                known_as = name or type(self).__name__
                raise InvalidType(
                    f'{known_as} has no argument {", ".join(unknown)}. If it comes from an '
                    'inherited config, replace that entry as a whole: '
                    f"dict(_delete_=True, type='{known_as}', ...).")
            user_errors(init)(self, *args, **kwargs)
        return cast(_Function, checked)
    return decorate


def user_errors(function: _Function) -> _Function:
    """Makes an error that this package raises in a function a user error.

    For functions that programs call as well, and that raise `TypeError`, `ValueError` or
    `FileNotFoundError`, whose subclasses the user errors are.
    """
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError:
            raise
        except (TypeError, ValueError, FileNotFoundError) as error:
            if not _is_raised_here(error):
                raise
            kind = next(kind for kind in (InvalidType, InvalidValue, MissingFile)
                        if isinstance(error, kind.__bases__[1]))
            raise kind(str(error)) from error
    return cast(_Function, checked)


def _is_raised_here(error: BaseException) -> bool:
    """Whether a module of this package raised it, and not one that was called by it."""
    module = ''
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get('__name__', '')
    return module.split('.')[0] == __name__.split('.')[0]


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, what caused that, and so on, as a traceback shows them."""
    seen: set[int] = set()
    current: Optional[BaseException] = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        hidden = None if current.__suppress_context__ else current.__context__
        current = current.__cause__ or hidden


def find_user_error(error: BaseException) -> Optional[UserError]:
    """The first user error that led to `error`: a registry raises another in its place.

    An error that came while a user error was handled, and is of another type, is a fault of its
    own, and hides nothing.
    """
    if not isinstance(error, UserError):
        return None
    return [link for link in chain(error) if isinstance(link, UserError)][-1]


def message_of(error: UserError) -> str:
    """The message without the traceback that a worker of a data loader puts before it."""
    text = str(error)
    start = f'{type(error).__module__}.{type(error).__name__}: '
    return text.rpartition(start)[2] if text.startswith('Caught ') else text
