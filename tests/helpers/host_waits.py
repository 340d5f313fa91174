# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A GPU that is none: counts where the host would wait for it.

Tensors made without a device count as lying on the host, all others, parameters and what comes of
them, on the device. The host waits where it reads a value (`item`, `bool`, `cpu`), where a shape
depends on values (`nonzero`, an index of booleans), and where it copies to the device from memory
that is not pinned.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# reads of a value, or of a number of values
_READS = {'item', '__bool__', '__int__', '__float__', '__index__', 'cpu', 'numpy', '__array__',
          'tolist', '__contains__', 'equal', 'allclose', 'is_nonzero', 'nonzero', 'argwhere',
          'masked_select', 'unique', 'unique_consecutive', 'bincount', 'inv', 'inverse', 'solve',
          'cholesky'}
_FACTORIES = {'tensor', 'as_tensor', 'from_numpy', 'arange', 'zeros', 'ones', 'full', 'empty',
              'linspace', 'eye', 'rand', 'randn', 'randperm', 'randint'}


def _is_on_host(tensor: Tensor) -> bool:
    return getattr(tensor, '_is_on_host', False)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _caller() -> str:
    """The line outside of torch that called."""
    frame = sys._getframe(2)
    while '/torch/' in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    name = '/'.join(frame.f_code.co_filename.rsplit('/', 2)[1:])
    return f'{name}:{frame.f_lineno}'


def _index_waits(index: Any, has_tensor_value: bool) -> Iterator[str]:
    """Why an index makes the host wait."""
    for part in index if isinstance(index, tuple) else (index,):
        is_tensor = isinstance(part, Tensor)
        if isinstance(part, (list, np.ndarray)) or is_tensor and part.dim() and _is_on_host(part):
            yield 'index from the host'
        elif is_tensor and part.dtype == torch.bool and has_tensor_value:
            yield 'index of booleans'


class HostWaits(TorchFunctionMode):
    """Counts while it is active.

    Attributes:
        places: how often the host waited, by what and where.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> HostWaits:
        self._from_numpy = torch.from_numpy  # which torch functions do not see

        def from_numpy(array: np.ndarray) -> Tensor:
            tensor = self._from_numpy(array)
            tensor._is_on_host = True
            return tensor

        torch.from_numpy = from_numpy
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.from_numpy = self._from_numpy
        super().__exit__(*error)

    @property
    def total(self) -> int:
        """All waits."""
        return sum(self.places.values())

    def __str__(self) -> str:
        return '\n'.join(f'{count:5d}  {what:22s} {where}'
                         for (what, where), count in self.places.most_common())

    def _waits(self, name: str, args: tuple, kwargs: dict) -> Iterator[str]:
        tensors = _tensors((args, kwargs))
        on_device = [tensor for tensor in tensors if not _is_on_host(tensor)]
        if name == '__getitem__' and on_device:
            yield from _index_waits(args[1], True)
        elif name == '__setitem__' and on_device:
            value = args[2]
            yield from _index_waits(args[1], isinstance(value, Tensor) and value.dim() > 0)
        elif name in ('tensor', 'as_tensor') and kwargs.get('device') is not None \
                and not on_device or name == 'new_tensor':
            yield f'{name} to the device'
        elif name in ('to', 'cuda', 'type_as') and _is_on_host(args[0]) and not kwargs.get(
                'non_blocking') and self._leaves_host(args[1:], kwargs):
            yield 'copy to the device'
        elif name == 'repeat_interleave':
            if isinstance(args[1], Tensor) and 'output_size' not in kwargs:
                yield name
        elif name in _READS and on_device:
            yield name

    @staticmethod
    def _leaves_host(args: tuple, kwargs: dict) -> bool:
        target = [*args, *kwargs.values()]
        return any(isinstance(value, (torch.device, str)) or
                   isinstance(value, Tensor) and not _is_on_host(value) for value in target)

    def _result_is_on_host(self, name: str, args: tuple, kwargs: dict) -> bool:
        tensors = _tensors((args, kwargs))
        if name == 'cpu':
            return True
        if name in ('to', 'cuda', 'type_as'):
            return _is_on_host(args[0]) and not self._leaves_host(args[1:], kwargs)
        if not tensors:
            return name in _FACTORIES and kwargs.get('device') is None
        return all(map(_is_on_host, tensors)) and kwargs.get('device') is None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        name = name[len('linalg_'):] if name.startswith('linalg_') else name
        if name != '__get__' and name != '__set__':
            for what in self._waits(name, args, kwargs):
                self.places[what, _caller()] += 1
        result = func(*args, **kwargs)
        if name == '__set__':
            return result
        if name in ('cpu', 'to', 'cuda') and result is args[0]:
            result = result.view_as(result)  # a copy would be another tensor
        inputs = {id(tensor) for tensor in _tensors((args, kwargs))}
        on_host = self._result_is_on_host(name, args, kwargs)
        for tensor in _tensors(result):
            if id(tensor) not in inputs:
                tensor._is_on_host = on_host
        return result
