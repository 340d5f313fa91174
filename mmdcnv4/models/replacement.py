# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Replaces convolutions and attention of any model by DCNv4, and reports what was not and why.

Source:   "Efficient Deformable ConvNets", arXiv:2401.06197, section 4.3, which replaces the
          operators of a ConvNeXt, a ViT and a U-Net.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Optional, Union

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn
from torch.nn.utils import parametrize

from ..errors import user_errors
from ..ops import DCNv4
from .layers.conv_start import STARTS, start_from_conv
from .layers.dcnv4_attention import DCNv4Attention
from .layers.dcnv4_conv import DCNv4Conv2d

TARGETS = ('depthwise', 'conv3x3', 'attention')
Match = Union[str, re.Pattern, Callable[[str, nn.Module], bool]]
_OPTIONS: dict[str, Any] = dict(
    group_channels=16, kernel_size=None, with_pointwise=None, value_width='in', offset_scale=1.0,
    dw_kernel_size=None, remove_center=False, softmax=False, center_feature_scale=False,
    mask_init=None)
_ATTENTION = re.compile(r'(Attention|MSA)(Block)?$')
_MIN_WIDTH = 8  # of a group, unless fewer are asked for


@dataclass(frozen=True)
class Entry:
    """One layer of the report.

    Attributes:
        name: qualified name; the first of them for a shared layer.
        kind: 'depthwise', 'conv3x3', 'attention', or another word for what is never replaced.
        old, new: parameters before and after; the same for a layer that was left.
        groups: of DCNv4; 0 for a layer that was left.
        note: what is particular, or why it was left.
    """

    name: str
    kind: str
    old: int
    new: int
    groups: int = 0
    note: str = ''


@dataclass(frozen=True)
class ReplacementReport:
    """What was replaced and what was not; `str()` gives a table.

    Attributes:
        replaced, skipped: entries in the order of the model.
        total: parameters of the whole model before.
    """

    replaced: tuple[Entry, ...]
    skipped: tuple[Entry, ...]
    total: int

    @property
    def new_total(self) -> int:
        """Parameters of the whole model afterwards."""
        return self.total + sum(entry.new - entry.old for entry in self.replaced)

    def __str__(self) -> str:
        rows = [('layer', 'kind', 'parameters', 'DCNv4', 'groups', 'note')]
        rows += [(entry.name, entry.kind, f'{entry.old:,}', f'{entry.new:,}', str(entry.groups),
                  entry.note) for entry in self.replaced]
        rows += [(entry.name, entry.kind, f'{entry.old:,}', 'left', '', entry.note)
                 for entry in self.skipped]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ['  '.join([*(cell.rjust(width) if column > 1 else cell.ljust(width) for
                              column, (cell, width) in enumerate(zip(row, widths))), row[5]]
                           ).rstrip() for row in rows]
        return '\n'.join([
            f'DCNv4 replaces {len(self.replaced)} layers, {len(self.skipped)} that match are left; '
            f'parameters of the model: {self.total:,} -> {self.new_total:,}', *lines])


class _Refusal(ValueError):
    """Why a layer is left as it is."""


@dataclass(frozen=True)
class _Task:
    """What is wanted: the targets, the options of DCNv4 and the start."""

    targets: tuple[str, ...]
    options: Mapping[str, Any]
    init_from: Optional[str]


@user_errors
def replace_with_dcnv4(model: nn.Module, *, match: Union[Match, Sequence[Match]],
                       targets: Sequence[str] = ('depthwise', 'conv3x3'),
                       cfg: Optional[Mapping[str, Any]] = None, init_from: Optional[str] = None,
                       dry_run: bool = False, allow_none: bool = False) -> ReplacementReport:
    """Replaces layers of `model` in place; the shapes of all results stay the same.

    To be called before the optimiser and DistributedDataParallel are made, and before weights of
    the changed model are loaded; with `init_from` after those of the original were.

    Args:
        model: any module. It cannot itself be the layer.
        match: which layers: a glob for their qualified names ('layer[34].*.conv2'), a regular
            expression (compiled, or a string after 're:') to be found in them, or a function of
            name and module; or several of these.
        targets: which kinds: 'depthwise' convolutions of 3x3 and larger, 'conv3x3', regular
            convolutions of 3x3, 'attention' that is told the size of its map (Swin, PVT).
        cfg: options of DCNv4: `group_channels` (16; where it does not divide the width, the
            largest smaller divisor that is a multiple of 8), `kernel_size` (that of the layer; 3
            makes a 7x7 a 3x3 one), `with_pointwise` (projections; False for depthwise, else True),
            `value_width` ('in' samples at the width of the input, 'out' at that of the output,
            which is smaller where a layer narrows),
            `offset_scale`, `dw_kernel_size`, `remove_center`, `softmax`, `center_feature_scale`,
            `mask_init` ('box' for convolutions, 'zero' for attention).
        init_from: 'conv' takes the kernels over as far as DCNv4 can represent them, 'center' their
            middle tap; see :mod:`mmdcnv4.models.layers.conv_start`. None for neither.
        dry_run: only report.
        allow_none: whether it is fine that nothing is replaced.

    Returns:
        The report.

    Raises:
        ValueError: an unknown option, or nothing was replaced; the message says what matched.
    """
    task = _check(targets, cfg, init_from)
    matches = _matcher(match)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError('replace_with_dcnv4: model must not be wrapped by '
                         'DistributedDataParallel yet: it would not know the new parameters')
    total = sum(parameter.numel() for parameter in model.parameters())
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    users = _weight_users(model)
    replaced, skipped, new_layers, covered = [], [], [], set()
    for module, aliases in names.items():
        chosen = [name for name in aliases if name and matches(name, module)]
        if module in covered or not chosen:
            continue
        kind = _kind(module, task.targets)
        if kind == '':
            continue
        old = sum(parameter.numel() for parameter in module.parameters())
        try:
            _refuse_shared(module, aliases, chosen, users)
            layer, groups, note = _make(module, kind, task)
        except _Refusal as reason:
            skipped.append(Entry(aliases[0], kind, old, old, note=str(reason)))
            covered |= set(module.modules()) if kind == 'DCNv4' else set()
            continue
        covered |= set(module.modules())
        if len(aliases) > 1:
            note = ', '.join(filter(None, [note, f'shared: also {", ".join(aliases[1:])}']))
        new = sum(parameter.numel() for parameter in layer.parameters())
        replaced.append(Entry(aliases[0], kind, old, new, groups, note))
        new_layers.append((aliases, layer))
    report = ReplacementReport(tuple(replaced), tuple(skipped), total)
    if not replaced and not allow_none:
        raise ValueError(_nothing(match, task.targets, report, names))
    if not dry_run:
        for aliases, layer in new_layers:
            _put(model, aliases, layer)
    return report


@MODELS.register_module()
@user_errors
def with_dcnv4(module: Mapping[str, Any], replace: Union[Mapping[str, Any], Sequence[Any]],
               **inherited: Any) -> nn.Module:
    """Builds a module of a config, replaces layers by DCNv4, and returns that very module.

    For a backbone, a neck, a head or a whole model; keys, class name and attributes stay::

        model = dict(backbone=dict(_delete_=True, type='with_dcnv4', module=_base_.model.backbone,
                                   replace=dict(match='layer[234].*.conv2')))

    With `init_from` the weights of the original are initialised, or read from its `init_cfg`,
    before the replacement; else afterwards, as always.

    Args:
        module: config of the module.
        replace: arguments of :func:`replace_with_dcnv4`, or a list of such.
        inherited: what the surrounding model adds to the config of its parts, such as
            `pretrained`; for `module`.

    Returns:
        The module; the log has the table.

    Raises:
        ValueError: see :func:`replace_with_dcnv4`.
    """
    built = MODELS.build({**module, **inherited})
    steps = [replace] if isinstance(replace, Mapping) else list(replace)
    if any(step.get('init_from') for step in steps) and hasattr(built, 'init_weights'):
        built.init_weights()
    for step in steps:
        if not isinstance(step, Mapping) or 'match' not in step:
            raise ValueError(f'with_dcnv4: replace must be a dict with match, got {step!r}')
        print_log(f'{type(built).__name__}: {replace_with_dcnv4(built, **step)}', logger='current')
    return built


def _check(targets: Sequence[str], cfg: Optional[Mapping[str, Any]],
           init_from: Optional[str]) -> _Task:
    if isinstance(targets, str) or not targets or not set(targets) <= set(TARGETS):
        raise ValueError(f'replace_with_dcnv4: targets must be some of {TARGETS}, got {targets!r}')
    given = dict(cfg or {})
    if not set(given) <= set(_OPTIONS):
        raise ValueError(f'replace_with_dcnv4: cfg must have keys among {tuple(_OPTIONS)}, got '
                         f'{sorted(set(given) - set(_OPTIONS))}')
    if init_from is not None and init_from not in STARTS:
        raise ValueError(f'replace_with_dcnv4: init_from must be None or one of {STARTS}, got '
                         f'{init_from!r}')
    options = {**_OPTIONS, **given}
    if options['value_width'] not in ('in', 'out'):
        raise ValueError("replace_with_dcnv4: value_width must be 'in' or 'out', got "
                         f'{options["value_width"]!r}')
    for name in ('group_channels', 'kernel_size'):
        value = options[name]
        if value is None and name == 'kernel_size':
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (
                name == 'kernel_size' and value % 2 == 0):
            rule = 'an odd number' if name == 'kernel_size' else 'a number >= 1'
            raise ValueError(f'replace_with_dcnv4: {name} must be {rule}, got {value!r}')
    return _Task(tuple(targets), options, init_from)


def _matcher(match: Union[Match, Sequence[Match]]) -> Callable[[str, nn.Module], bool]:
    if isinstance(match, (list, tuple)) and match:
        some = [_matcher(item) for item in match]
        return lambda name, module: any(one(name, module) for one in some)
    if isinstance(match, str) and match.startswith('re:'):
        match = re.compile(match[3:])
    if isinstance(match, re.Pattern):
        pattern = match
        return lambda name, module: pattern.search(name) is not None
    if isinstance(match, str) and match:
        glob = match
        return lambda name, module: fnmatch.fnmatchcase(name, glob)
    if callable(match):
        return match
    raise ValueError('replace_with_dcnv4: match must be a glob, a regular expression, a function '
                     f'of name and module, or several of these, got {match!r}')


def _kind(module: nn.Module, targets: Iterable[str]) -> str:
    """Word for what could be meant; '' for modules that are none of it."""
    if isinstance(module, (DCNv4, DCNv4Attention)):
        return 'DCNv4'
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1 and module.groups == module.in_channels == module.out_channels:
            return 'depthwise'
        return 'conv3x3' if module.kernel_size == (3, 3) and module.groups == 1 else 'convolution'
    if 'attention' in targets and (_ATTENTION.search(type(module).__name__)
                                   or isinstance(module, nn.MultiheadAttention)):
        return 'attention'
    return ''


def _weight_users(model: nn.Module) -> dict[nn.Parameter, set[nn.Module]]:
    """Modules that hold each parameter."""
    users: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, set()).add(module)
    return users


def _refuse_shared(module: nn.Module, aliases: list[str], chosen: list[str],
                   users: dict[nn.Parameter, set[nn.Module]]) -> None:
    others = [name for name in aliases if name not in chosen]
    if others:
        raise _Refusal(f'is also {", ".join(others)}, which does not match')
    inside = set(module.modules())
    if any(not users[parameter] <= inside for parameter in module.parameters()):
        raise _Refusal('shares its weights with another layer')


def _make(module: nn.Module, kind: str, task: _Task) -> tuple[nn.Module, int, str]:
    """The new layer, its groups and a note.

    Raises:
        _Refusal: with the reason.
    """
    if kind == 'DCNv4':
        raise _Refusal('is DCNv4 already')
    is_quantised = 'quantized' in type(module).__module__ or getattr(module, 'qconfig', None)
    if is_quantised or '.ao.nn.' in type(module).__module__:
        raise _Refusal('is quantised')
    if module._forward_hooks or module._forward_pre_hooks or parametrize.is_parametrized(module):
        raise _Refusal('has hooks or a parametrisation, such as a weight norm')
    if isinstance(module, nn.modules.conv._ConvNd):
        _refuse_conv(module, kind, task.targets)
        layer, note = _make_conv(module, kind, task)  # type: ignore[arg-type]
    else:
        layer, note = _make_attention(module, task)
    first = next(module.parameters())
    layer = layer.to(first.dtype).train(module.training).requires_grad_(first.requires_grad)
    return layer, _groups(layer), note


def _groups(layer: nn.Module) -> int:
    return next(m.geometry.groups for m in layer.modules() if isinstance(m, DCNv4))


def _refuse_conv(conv: Any, kind: str, targets: Sequence[str]) -> None:
    if conv.transposed:
        raise _Refusal('transposed convolution')
    if not isinstance(conv, nn.Conv2d):
        raise _Refusal(f'{len(conv.kernel_size)}-D convolution')
    is_plain = type(conv).forward is nn.Conv2d.forward or (
        type(conv).__module__ == 'mmcv.cnn.bricks.wrappers')
    if not is_plain:
        raise _Refusal(f'{type(conv).__name__} computes more than a convolution')
    size = 'x'.join(map(str, conv.kernel_size))
    if set(conv.kernel_size) == {1}:
        raise _Refusal('1x1: nothing to sample')
    if any(length % 2 == 0 for length in conv.kernel_size):
        raise _Refusal(f'kernel {size} has an even side')
    if kind == 'convolution':
        raise _Refusal(f'grouped convolution of {conv.groups} groups' if conv.groups > 1 else
                       f'regular convolution of {size}, not 3x3')
    if conv.padding_mode != 'zeros':
        raise _Refusal(f'padding_mode {conv.padding_mode!r}; DCNv4 has zeros outside the map')
    if kind not in targets:
        raise _Refusal(f'{kind} is not among the targets')


def _width(channels: int, wanted: int) -> int:
    """Channels per group: `wanted`, or the largest smaller divisor that is a multiple of 8."""
    if channels % wanted == 0:
        return wanted
    fitting = [width for width in range(_MIN_WIDTH, min(wanted, channels) + 1, _MIN_WIDTH)
               if channels % width == 0]
    if not fitting:
        raise _Refusal(f'width {channels}: no divisor up to {wanted} is a multiple of 8; choose '
                       'group_channels among its divisors')
    return fitting[-1]


def _padding(conv: nn.Conv2d, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Padding that keeps the shape and the centres of the windows with another kernel."""
    old = conv.padding
    if isinstance(old, str):
        old = tuple(dilation * (size - 1) // 2 if conv.padding == 'same' else 0
                    for dilation, size in zip(conv.dilation, conv.kernel_size))
    new = tuple(pad + dilation * (size - before) // 2 for pad, dilation, size, before in
                zip(old, conv.dilation, kernel, conv.kernel_size))
    if min(new) < 0:
        raise _Refusal(f'its shape would change: a kernel of {kernel} would need padding {new}')
    return new


def _make_conv(conv: nn.Conv2d, kind: str, task: _Task) -> tuple[nn.Module, str]:
    options = dict(task.options)
    wanted, size = options.pop('group_channels'), options.pop('kernel_size')
    with_pointwise = options.pop('with_pointwise')
    if with_pointwise is None:
        with_pointwise = kind != 'depthwise'
    if not with_pointwise and conv.in_channels != conv.out_channels:
        raise _Refusal('without projections it cannot change its width')
    kernel = conv.kernel_size if size is None else (size, size)
    # by default the change of width rides on the last projection, as in the U-Net of the paper
    channels = conv.in_channels if options.pop('value_width') == 'in' else conv.out_channels
    width = _width(channels, wanted)
    notes = [] if width == wanted else [f'{width} channels per group']
    notes += [] if kernel == conv.kernel_size else [
        f'{"x".join(map(str, conv.kernel_size))} to {size}x{size}']
    notes += [f'stride {max(conv.stride)}'] if max(conv.stride) > 1 else []
    with torch.device(conv.weight.device):
        layer = DCNv4Conv2d(
            conv.in_channels, conv.out_channels, kernel, conv.stride, _padding(conv, kernel),
            conv.dilation, bias=conv.bias is not None, group=channels // width,
            value_channels=channels, without_pointwise=not with_pointwise, **options)
    if task.init_from is not None:
        notes.append(start_from_conv(layer, conv, task.init_from))
    return layer, ', '.join(filter(None, notes))


def _make_attention(module: Any, task: _Task) -> tuple[nn.Module, str]:
    parameters = list(inspect.signature(module.forward).parameters)
    if parameters[1:2] != ['hw_shape']:
        raise _Refusal('its forward is not told the size of the map (hw_shape)')
    channels = getattr(module, 'embed_dims', getattr(
        getattr(module, 'w_msa', None), 'embed_dims', None))
    if channels is None:
        raise _Refusal('has no embed_dims')
    options = {key: value for key, value in task.options.items()
               if value is not None and key != 'value_width'}
    if options.pop('with_pointwise', True) is False:
        raise _Refusal('attention is replaced by DCNv4 with its projections')
    width = _width(channels, options.pop('group_channels'))
    drops = [getattr(module, name) for name in ('drop', 'proj_drop', 'dropout_layer')
             if isinstance(getattr(module, name, None), nn.Module)]
    with torch.device(next(module.parameters()).device):
        layer = DCNv4Attention(channels, nn.Sequential(*drops), 'identity' in parameters,
                               group=channels // width, **options)
    return layer, '' if width == task.options['group_channels'] else f'{width} channels per group'


def _put(model: nn.Module, aliases: list[str], layer: nn.Module) -> None:
    """Puts the layer everywhere where the old one was."""
    for name in aliases:
        parent_name, _, child = name.rpartition('.')
        parent = model.get_submodule(parent_name)
        setattr(parent, child, layer)
        if child == 'conv' and hasattr(parent, 'with_explicit_padding'):  # a ConvModule of mmcv
            for attribute in ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding',
                              'dilation', 'transposed', 'output_padding', 'groups'):
                setattr(parent, attribute, getattr(layer, attribute))


def _nothing(match: object, targets: tuple[str, ...], report: ReplacementReport,
             names: dict[nn.Module, list[str]]) -> str:
    text = f'replace_with_dcnv4: match must select a layer that can be replaced, got {match!r} '
    if report.skipped:
        reasons = [f'{entry.name}: {entry.note}' for entry in report.skipped[:4]]
        more = ', ...' if len(report.skipped) > 4 else ''
        return f'{text}which selects none of the kinds {targets}: {"; ".join(reasons)}{more}'
    known = [aliases[0] for module, aliases in names.items() if _kind(module, targets)]
    return (f'{text}which is the name of no convolution{" or attention" * ("attention" in targets)}'
            f'; there are {len(known)}: {", ".join(known[:6])}{", ..." * (len(known) > 6)}')
