# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is that of a model: tensor by tensor, and which entry of the config is why.

mmengine writes a line to its log where tensors do not fit, and goes on with random ones.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Size, Tensor, nn

from ..errors import InvalidValue

_MOST_ROWS = 12  # of a table
# entries of a model that change no tensor
_NO_SHAPE = ('init_cfg', 'train_cfg', 'test_cfg', 'data_preprocessor', 'with_cp', 'loss')


class Shapes(dict[str, Size]):
    """Shapes of the tensors in a checkpoint by their names.

    Attributes:
        metadata: versions of the modules that wrote them, as torch keeps them.
        config: text of the config that the checkpoint was trained with; None where it has none.
    """

    def __init__(self, weights: dict, config: Optional[str] = None) -> None:
        super().__init__((name, value.shape) for name, value in weights.items()
                         if isinstance(value, Tensor))
        self.metadata: dict = getattr(weights, '_metadata', None) or {}
        self.config = config

    @classmethod
    def of(cls, checkpoint: dict) -> Shapes:
        """Of what a file holds: weights, or a dict with them in `state_dict`."""
        weights = checkpoint.get('state_dict', checkpoint)
        renamed = type(weights)((name.removeprefix('module.') if isinstance(name, str) else str(
            name), value) for name, value in weights.items())
        if hasattr(weights, '_metadata'):
            renamed._metadata = weights._metadata
        text = (checkpoint.get('meta') or {}).get('cfg')
        return cls(renamed, text if isinstance(text, str) else None)


class Mismatch(NamedTuple):
    """What does not fit.

    Attributes:
        shapes: name, shape in the file, shape in the model.
        missing: tensors of the model that are not in the file.
        foreign: tensors of the file that are not in the model, in parts that the model has.
        unused: tensors of the file in parts that the model has not, as heads for training.
        total: tensors of the model.
    """

    shapes: list[tuple[str, Size, Size]]
    missing: list[str]
    foreign: list[str]
    unused: list[str]
    total: int


def unwrapped(model: Any) -> nn.Module:
    """The model inside wrappers for several processes or for test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _stand_in(shape: Size) -> Tensor:
    """A tensor of one number that looks as large: what loads it may read it, and costs nothing."""
    return torch.zeros(()).expand(shape)


@contextmanager
def _without_storage(model: nn.Module) -> Iterator[None]:
    """Stand-ins in the place of all tensors: what modules do as they load writes nowhere."""
    kept = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        for module, parameters, buffers in kept:
            module._parameters.update({
                name: nn.Parameter(_stand_in(value.shape), requires_grad=False)
                for name, value in parameters.items() if value is not None})
            module._buffers.update({name: _stand_in(value.shape)
                                    for name, value in buffers.items() if value is not None})
        yield
    finally:
        for module, parameters, buffers in kept:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _fits(file: Size, model: Size) -> bool:
    return file == model or (file == (1,) and model == ())  # torch loads one number into a scalar


def compare(model: nn.Module, shapes: Shapes) -> Mismatch:
    """Compares a model with a checkpoint, names of older versions translated as in loading.

    Args:
        model: built, without wrappers.
        shapes: of the checkpoint.
    """
    found = Mismatch([], [], [], [], len(model.state_dict()))

    def visit(module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
        # modules rename and resize here, in `state`
        module._load_from_state_dict(state, prefix, shapes.metadata.get(prefix[:-1], {}), True,
                                     [], [], [])
        own = {**module._parameters, **{
            name: value for name, value in module._buffers.items()
            if name not in module._non_persistent_buffers_set}}
        children = {name: child for name, child in module._modules.items() if child is not None}
        for name, value in own.items():
            key = prefix + name
            if value is not None and key not in state and name != 'num_batches_tracked':
                found.missing.append(key)
            elif value is not None and key in state and not _fits(state[key].shape, value.shape):
                found.shapes.append((key, state[key].shape, value.shape))
        for key in state:
            first = key[len(prefix):].split('.')[0]
            if first not in own and first not in children and first != '_extra_state':
                (found.foreign if prefix else found.unused).append(key)
        for name, child in children.items():
            start = f'{prefix}{name}.'
            visit(child, {key: value for key, value in state.items() if key.startswith(start)},
                  start)

    with _without_storage(model):
        visit(model, {name: _stand_in(shape) for name, shape in shapes.items()}, '')
    return found


# ------------------------------------------------------------------------- entries of the config


def _value(node: ast.expr) -> Any:
    """A literal, or `dict(...)` of such; the text of a checkpoint must not run."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' \
            and not node.args:
        return {str(item.arg): _value(item.value) for item in node.keywords}
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values)
                if key is not None}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    return ast.literal_eval(node)


def _model_of(text: Optional[str]) -> Optional[dict]:
    """The entry `model` of a config as mmengine prints it; None where it cannot be read."""
    try:
        for statement in ast.parse(text or '').body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name) \
                    and statement.targets[0].id == 'model':
                return _value(statement.value)
    except (SyntaxError, ValueError):
        pass
    return None


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(dotted way, value) of what is no dict; lists of dicts by number."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)) and any(isinstance(item, dict) for item in node):
        for index, value in enumerate(node):
            yield from _leaves(value, f'{path}.{index}')
    elif not any(part.startswith(_NO_SHAPE) for part in path.split('.')):
        yield path, list(node) if isinstance(node, tuple) else node


def _concerns(path: str, parts: set[str]) -> bool:
    """Whether an entry is of one of these parts of the model, or of the model as a whole."""
    steps = path.split('.')
    return len(steps) == 2 or steps[1] in parts


def _entries(parts: set[str], shapes: Shapes, cfg: Optional[Config]) -> list[str]:
    """Entries of the config that may be why tensors of these parts differ."""
    if cfg is None or not cfg.get('model'):
        return []
    model = cfg.model.to_dict() if hasattr(cfg.model, 'to_dict') else dict(cfg.model)
    model = model['module'] if 'module' in model and 'tta_cfg' in model else model
    here = dict(_leaves(model, 'model'))
    saved = _model_of(shapes.config)
    if saved is None:
        return [f'  {path}={value!r}' for path, value in here.items()
                if _concerns(path, parts) and isinstance(value, (int, list))
                and not isinstance(value, bool)]
    there = dict(_leaves(saved, 'model'))
    nothing = 'nothing'
    return [f'  {path}: {there.get(path, nothing)!r} in the checkpoint, '
            f'{here.get(path, nothing)!r} in the config'
            for path in {**there, **here} if _concerns(path, parts)
            and there.get(path, nothing) != here.get(path, nothing)]


# --------------------------------------------------------------------------------------- messages


def _first(rows: list[str], separator: str = '\n') -> str:
    rest = len(rows) - _MOST_ROWS
    return separator.join(rows[:_MOST_ROWS] + ([f'  and {rest} more'] if rest > 0 else []))


def _table(found: Mismatch, shapes: Shapes, cfg: Optional[Config]) -> str:
    """What does not fit, and the entries of the config behind it."""
    parts = []
    if found.shapes:
        width = max(len(name) for name, _, _ in found.shapes[:_MOST_ROWS])
        rows = [f'  {name:{width}}  {tuple(file)!s:>20} in the file, {tuple(model)} in the model'
                for name, file, model in found.shapes]
        parts.append(f'{len(rows)} of {found.total} tensors have another shape:\n{_first(rows)}')
    for names, where in ((found.missing, 'of the model are not in the file'),
                         (found.foreign, 'of the file are not in the model')):
        if names:
            parts.append(f'{len(names)} tensors {where}: {_first(names, ", ")}')
    concerned = {name.split('.')[0] for name in (
        *(name for name, _, _ in found.shapes), *found.missing, *found.foreign)}
    entries = _entries(concerned, shapes, cfg)
    if entries:
        is_difference = _model_of(shapes.config) is not None
        parts.append(('entries of the config that differ from those of the checkpoint:\n'
                      if is_difference else 'entries of the config that may be why:\n')
                     + _first(entries))
    return '\n'.join(parts)


def check_match(model: Any, shapes: Shapes, path: str, cfg: Optional[Config] = None,
                must_match: bool = True, option: Optional[str] = None) -> None:
    """Refuses, or says, what of a checkpoint does not fit a model.

    Tensors of parts that the model has not at all, as heads for training, are no fault.

    Args:
        model: built, also inside a wrapper.
        shapes: of the checkpoint.
        path: of the checkpoint, for the message.
        cfg: the config of the run, for the message.
        must_match: raise; else a warning, as for weights that a training starts from.
        option: what the user can set to go on all the same; None: there is nothing.

    Raises:
        ValueError: under a tenth of the weights of the model are in the file, in their shape; or
            one does not fit and `must_match` is set. The message lists tensors and entries.
    """
    found = compare(unwrapped(model), shapes)
    matching = found.total - len(found.shapes) - len(found.missing)
    if 10 * matching < found.total:
        raise InvalidValue(
            f'the checkpoint {path} is not of this model: of the {found.total} weights of the '
            f'model {matching} are in the file, which holds {len(shapes)}. Published weights are '
            'converted by tools/model_converters/convert_checkpoint.py, those of BEVFormer v2 by '
            'bevformer_v2.py beside it.')
    if not (found.shapes or found.missing or found.foreign):
        return
    text = _table(found, shapes, cfg)
    if must_match:
        way_out = '' if option is None else (
            f'; or go on with {option}, and what does not fit keeps its random start values')
        raise InvalidValue(f'the checkpoint {path} does not fit the model:\n{text}\n'
                           f'Take the config that it was trained with{way_out}.')
    print_log(f'the checkpoint {path} does not fit the model in full; what does not fit keeps its '
              f'start values:\n{text}', logger='current', level=30)
