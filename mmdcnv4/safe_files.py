# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Reads pickle and YAML files of others without running what they hold.

A pickle names functions and calls them, and so does YAML with tags such as `!!python/object/apply`.
Data files need a few harmless types, and nothing else is looked up here.
"""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
from typing import Any, Optional

import numpy as np
import torch
import yaml
from mmengine.fileio import get, register_handler
from mmengine.fileio.handlers import BaseFileHandler, PickleHandler, YamlHandler

from .errors import InvalidValue

VARIABLE = 'MMDCNV4_TRUST_FILES'  # 1: read everything as MMEngine does
_BUILTINS = ('bool', 'bytearray', 'bytes', 'complex', 'dict', 'float', 'frozenset', 'int', 'list',
             'range', 'set', 'slice', 'str', 'tuple')
_NUMPY = {'ndarray', 'dtype', '_reconstruct', 'scalar', '_frombuffer', 'bool_', 'int8', 'int16',
          'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64', 'float16', 'float32', 'float64'}
_NUMPY_MODULES = ('numpy', 'numpy.core.multiarray', 'numpy._core.multiarray', 'numpy.core.numeric',
                  'numpy._core.numeric')
_TORCH = {'torch._utils': ('_rebuild_tensor_v2',), 'torch': ('Size', 'device')}
_BOXES = {f'mmdet3d.structures.bbox_3d.{module}': name for module, name in (
    ('lidar_box3d', 'LiDARInstance3DBoxes'), ('cam_box3d', 'CameraInstance3DBoxes'),
    ('depth_box3d', 'DepthInstance3DBoxes'),
    ('box_3d_mode', 'Box3DMode'))}  # in the results of tools/test.py --out


def _load_storage(content: bytes) -> Any:
    """Stands in for torch's function of that purpose, which unpickles without a limit."""
    return torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)


class _Unpickler(pickle.Unpickler):
    """Knows numbers, texts, containers, arrays, tensors, and boxes of mmdet3d."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ('builtins', '__builtin__') and name in _BUILTINS:
            return getattr(builtins, name)
        if (module, name) == ('collections', 'OrderedDict'):
            return collections.OrderedDict
        if (module, name) == ('_codecs', 'encode'):  # bytes, in pickles of Python 2's protocol
            return super().find_class(module, name)
        if module in _NUMPY_MODULES and name in _NUMPY or \
                module == 'numpy.dtypes' and name.endswith('DType'):
            # numpy 1 and 2 call the module otherwise
            core = 'numpy._core' if int(np.__version__.split('.')[0]) >= 2 else 'numpy.core'
            return super().find_class(
                module.replace('numpy._core', core).replace('numpy.core', core)
                if module.startswith(('numpy.core', 'numpy._core')) else module, name)
        if name in _TORCH.get(module, ()) or _BOXES.get(module) == name:
            return super().find_class(module, name)
        if (module, name) == ('torch.storage', '_load_from_bytes'):
            return _load_storage
        raise pickle.UnpicklingError(f'{module}.{name}')


def load_pickle(stream: Any, name: str) -> Any:
    """The content of a pickle that holds plain data, arrays and tensors.

    Args:
        stream: open for reading bytes.
        name: of the file, for the message.

    Raises:
        InvalidValue: the file names anything else, or is no pickle.
    """
    try:
        return _Unpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise InvalidValue(
            f'the pickle file {name} is refused: it is no plain data ({error}), and could run '
            f'code. If you made it yourself and trust it: {VARIABLE}=1 in the environment.'
        ) from error
    except (EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError,
            ImportError) as error:
        raise InvalidValue(f'the pickle file {name} is no pickle, or is cut off '
                           f'({type(error).__name__}: {error}).') from error


def load_infos(path: str, backend_args: Optional[dict] = None) -> Any:
    """An info file, a pickle or JSON, from any storage backend of MMEngine.

    Raises:
        InvalidValue: see :func:`load_pickle`.
    """
    import mmengine
    if not str(path).endswith(('.pkl', '.pickle')):
        return mmengine.load(path, backend_args=backend_args)
    content = io.BytesIO(get(path, backend_args=backend_args))
    if os.environ.get(VARIABLE) == '1':  # MMEngine may read as this module does by now
        return pickle.load(content)
    return load_pickle(content, str(path))


def _name(file: Any) -> str:
    """Of an open file; MMEngine hands over the bytes of many without one."""
    return str(getattr(file, 'name', '(annotations, infos or proposals, which the config names)'))


class _SafePickleHandler(PickleHandler):
    """MMEngine's handler, which looks up plain types alone."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        return load_pickle(file, _name(file))


class _SafeLoader(yaml.SafeLoader):
    """Texts, numbers, lists, dicts; and tuples, which MMEngine writes with a tag of Python."""


_SafeLoader.add_constructor('tag:yaml.org,2002:python/tuple',
                            lambda loader, node: tuple(loader.construct_sequence(node)))


class _SafeYamlHandler(YamlHandler):
    """MMEngine's handler without the tags that make Python objects."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        name = _name(file)
        try:
            return yaml.load(file, Loader=_SafeLoader)
        except yaml.constructor.ConstructorError as error:
            raise InvalidValue(f'the file {name} is refused: {error.problem}; such tags can run '
                               'code. Plain YAML holds texts, numbers, lists and dicts.'
                               ) from error


def read_safely() -> None:
    """Lets MMEngine read pickle and YAML files in this process as this module does.

    The tools call it; with MMDCNV4_TRUST_FILES=1 pickles are read as before.
    """
    handlers: list[tuple[type[BaseFileHandler], list[str]]] = [(_SafeYamlHandler, ['yaml', 'yml'])]
    if os.environ.get(VARIABLE) != '1':
        handlers.append((_SafePickleHandler, ['pkl', 'pickle']))
    for handler, formats in handlers:
        register_handler(formats)(handler)
