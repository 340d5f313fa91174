# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Reads published weights into a backbone, without running code from the file.

A file may be a bare state dict or hold one under `state_dict`, `model_ema`, `model` and so on; its
keys may begin with what wrappers, detectors and teachers put before them. mmengine's own
`Pretrained` knows `state_dict` alone and loads nothing, without an error, from the others.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional
from urllib.parse import urlsplit

import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import print_log
from torch import Tensor, nn

from ..errors import user_errors

_CONTAINERS = ('state_dict', 'model_ema', 'model', 'ema_state_dict', 'teacher')
# Where the backbone stands in a whole model, the first that is there: a detector, one of mmdet3d,
# and semi-supervised or distilled ones, whose teacher is the average of the student.
_PLACES = ('backbone.', 'img_backbone.', 'teacher.backbone.', 'teacher.', 'student.backbone.')
# torch.compile, DistributedDataParallel and the averaged model of mmengine
_WRAPPERS = re.compile(r'(?:^|(?<=\.))_orig_mod\.|^(?:(?:module|_orig_mod)\.)+')
# Names in training checkpoints that say nothing about weights: the settings of the published
# classifiers, and the logs of mmengine. None becomes the object it names.
_INERT_MAPPINGS = ('yacs.config.CfgNode', 'argparse.Namespace')  # read as an OrderedDict
_INERT_OBJECTS = (
    'mmengine.logging.history_buffer.HistoryBuffer', 'numpy.core.multiarray.scalar',
    'numpy._core.multiarray.scalar', 'numpy.core.multiarray._reconstruct',
    'numpy._core.multiarray._reconstruct', 'numpy.ndarray', 'numpy.dtype', '__builtin__.getattr',
    'builtins.getattr')  # read as an `_Inert`
_SHOWN = 8
_START = 40  # bytes of a file that is not a checkpoint, for its error
# What torch raises for files that are refused, cut off, or no pickle at all.
_READ_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError,
                LookupError, AssertionError, AttributeError)


class WeightRules(NamedTuple):
    """What is special about the published files of a family.

    Attributes:
        ignored: beginnings of keys that a backbone has no use for: classifiers, heads.
        optional: names of what a file may lack altogether, and beginnings or ends of its keys.
        optional_alone: the same for keys of which a file may have some and lack others.
        optional_note: what to tell the user then, if anything.
        source: where the weights are published.
        adapt: brings the tensors of a file into the form of the model; gets the model and them.
    """

    ignored: tuple[str, ...] = ()
    optional: tuple[str, str] = ('optional', '$')
    optional_alone: str = '$^'  # matches nothing
    optional_note: str = ''
    source: str = ''
    adapt: Optional[Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]] = None

    def is_optional(self, key: str) -> bool:
        """Whether a key belongs to what may be absent."""
        return re.search(self.optional[1], key) is not None


FLASH_WEIGHTS = WeightRules(
    ignored=('conv_head.', 'head.', 'fc_norm.', 'clip_projector.', 'dcnv3_head_x3.',
             'dcnv3_head_x4.'),
    optional=('layer-scale', r'gamma[12]$'),
    optional_note='has no layer scale; with layer_scale=1.0 the function is unchanged, with '
                  'another value it is not',
    source='The FlashInternImage weights are published in the Hugging Face repository '
           'OpenGVLab/DCNv4: put the file there')


class _Inert:
    """Stands for an object that is not needed; takes any arguments and any state."""

    def __new__(cls, *args: Any) -> _Inert:
        """Ignores the arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        """Ignores the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Forgets the state."""


@user_errors
def load_pretrained(model: nn.Module, checkpoint: str, prefix: Optional[str] = None,
                    map_location: str = 'cpu', rules: WeightRules = FLASH_WEIGHTS) -> None:
    """Loads a published file into a backbone and logs what matched.

    Args:
        model: the backbone; its keys are those of the published files.
        checkpoint: path or http(s) URL of a .pth or .safetensors file.
        prefix: take only keys that begin with it, and cut it off; None cuts `module.` and
            `_orig_mod.` and, in the file of a whole model, keeps what is below `backbone.`,
            `img_backbone.`, `teacher.backbone.`, `teacher.` or `student.backbone.`, the first of
            these that is there.
        map_location: where the tensors are read to.
        rules: of the family.

    Raises:
        FileNotFoundError: no such file; says where the published weights are.
        OSError: the URL cannot be fetched.
        ValueError: the file holds something else than weights, or weights that do not fit.
            What `rules.ignored` names may be left over, what `rules.optional` names missing.
    """
    content = read_file(
        checkpoint, map_location, f'{rules.source}. To train from scratch instead, set the '
        'init_cfg of the backbone to None, in the config or with --cfg-options '
        'model.backbone.init_cfg=None')
    weights = select_backbone(find_state_dict(content, checkpoint), prefix)
    own = model.state_dict()
    used = {key: value for key, value in weights.items() if not key.startswith(rules.ignored)}
    ignored = len(weights) - len(used)
    if rules.adapt is not None:
        used = rules.adapt(model, used)
    mismatched = [f'{key} {tuple(used[key].shape)}, expected {tuple(own[key].shape)}'
                  for key in own if key in used and used[key].shape != own[key].shape]
    found = [key for key in own if key in used]
    missing = [key for key in own if key not in used]
    unexpected = [key for key in used if key not in own]
    # a file without any of the optional tensors leaves them at their initial values
    is_absent = not any(map(rules.is_optional, used))
    kept = [key for key in missing if is_absent and rules.is_optional(key)
            or re.search(rules.optional_alone, key)]
    missing = [key for key in missing if key not in kept]
    if len(found) < len(own) / 10:
        tops = sorted({key.split('.')[0] for key in weights})
        raise ValueError(
            f'Pretrained: checkpoint must hold weights of {type(model).__name__}, but '
            f'{checkpoint} matches {len(found)} of {len(own)} keys; its keys begin with '
            f'{_shorten(tops)}, expected {_shorten(sorted({key.split(".")[0] for key in own}))}. '
            'Give init_cfg a prefix where the backbone stands below one')
    report = (f'{len(found) - len(mismatched)} of {len(own)} tensors matched; '
              f'{ignored} classifier tensors ignored; '
              f'{len(kept)} {rules.optional[0]} tensors absent, left at their start; '
              f'missing {_shorten(missing)}; unexpected {_shorten(unexpected)}; '
              f'of another shape {_shorten(mismatched)}')
    if missing or unexpected or mismatched:
        raise ValueError('Pretrained: checkpoint must fit the backbone without missing, '
                         f'unexpected or differently shaped tensors, got {checkpoint}: {report}')
    model.load_state_dict(used, strict=not kept)
    print_log(f'{type(model).__name__} loaded {checkpoint}: {report}', logger='current')
    if kept and rules.optional_note:
        print_log(f'{checkpoint} {rules.optional_note}', logger='current', level=logging.WARNING)


def _shorten(names: list[str]) -> str:
    """Count and first names."""
    if not names:
        return '0'
    more = ', ...' if len(names) > _SHOWN else ''
    return f'{len(names)} ({", ".join(names[:_SHOWN])}{more})'


def select_backbone(weights: Mapping[str, Tensor], prefix: Optional[str]) -> dict[str, Tensor]:
    """Cuts the prefixes that wrappers, detectors and segmentors put before the backbone's keys."""
    if prefix is not None:
        prefix = prefix if prefix.endswith('.') else prefix + '.'
        return {key[len(prefix):]: value for key, value in weights.items()
                if key.startswith(prefix)}
    bare = {_WRAPPERS.sub('', key): value for key, value in weights.items()}
    for place in _PLACES:
        inside = {key[len(place):]: value for key, value in bare.items() if key.startswith(place)}
        if inside:
            return inside
    return bare


@user_errors
def find_state_dict(content: Any, source: str) -> Mapping[str, Tensor]:
    """Finds the state dict inside the content of a file.

    Raises:
        ValueError: there is none.
    """
    if isinstance(content, Mapping):
        inner = [content[key] for key in _CONTAINERS
                 if isinstance(content.get(key), Mapping) and content[key]]
        weights = inner[0] if inner else content
        tensors = {key: value for key, value in weights.items()
                   if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors:
            return tensors
    keys = list(content) if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(f'Pretrained: checkpoint must hold a state dict, bare or under one of '
                     f'{_CONTAINERS}, got {source} with {keys}')


@user_errors
def read_file(checkpoint: str, map_location: str = 'cpu',
              advice: str = '') -> Any:
    """Reads a .pth or .safetensors file, weights only.

    Args:
        checkpoint: path or http(s) URL.
        map_location: where the tensors are read to.
        advice: what to do where the file is missing, for the error.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a .safetensors file, and that package is not installed.
        OSError: the URL cannot be fetched.
        ValueError: the file is damaged, or holds other objects than weights.
    """
    path = _download(checkpoint) if re.match(r'https?://', checkpoint) else (
        Path(checkpoint).expanduser())  # as mmengine's loader does
    if not path.is_file():
        raise FileNotFoundError(
            f'Pretrained: checkpoint must be an existing file or an http(s) URL, got '
            f'{checkpoint!r}{advice and ". "}{advice}')
    if path.suffix == '.safetensors':
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(f'Pretrained: {checkpoint} needs the package safetensors: '
                              'pip install safetensors') from None
        return load_file(path, device=map_location)
    with _allow_inert():
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except _READ_ERRORS as error:
            raise ValueError(_explain(checkpoint, path, str(error))) from None


@contextmanager
def _allow_inert() -> Iterator[None]:
    """Lets torch read the inert names and no others, where it can map names (torch >= 2.6).

    The list that is in force is set aside: the tools allow MMEngine's own types, to resume, and
    one name can stand for one thing only.
    """
    if not _can_map_names():
        yield
        return
    allowed: list[Any] = [(OrderedDict, name) for name in _INERT_MAPPINGS]
    allowed += [(_Inert, name) for name in _INERT_OBJECTS]
    previous = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        torch.serialization.add_safe_globals(previous)


def _can_map_names() -> bool:
    return tuple(int(part) for part in torch.__version__.split('.')[:2]) >= (2, 6)


def _explain(checkpoint: str, path: Path, error: str) -> str:
    """Message for a file that torch refuses to read weights-only.

    Without torch's own text, which advises to switch that safety off.
    """
    name = re.search(r'GLOBAL ([\w.]+)', error)
    if name is None:
        with open(path, 'rb') as file:  # perhaps of gigabytes
            start = file.read(_START)
        found = f'begins with {start!r}' if start else 'is empty'
        return (f'Pretrained: checkpoint must be a whole file of weights, got {checkpoint}, which '
                f'is not a checkpoint, or truncated (it {found})')
    text = (f'Pretrained: checkpoint must hold tensors and plain values, got {checkpoint}, which '
            f'names {name.group(1)}; nothing was run from it.')
    if name.group(1) in _INERT_MAPPINGS + _INERT_OBJECTS:
        return (f'{text} torch >= 2.6 can read it (this is {torch.__version__}), or keep only its '
                "weights: torch.save({'state_dict': ...}, file)")
    return f'{text} If you trust the file, keep only its weights and save them again'


def _download(url: str) -> Path:
    """Fetches `url` into torch's cache, the first process before the others."""
    name = Path(urlsplit(url).path)
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]  # other URLs may end in the same name
    target = Path(torch.hub.get_dir()) / 'checkpoints' / f'{name.stem}-{digest}{name.suffix}'
    try:
        if get_rank() == 0:
            _fetch(url, target)
    finally:
        barrier()
    _fetch(url, target)  # for other nodes with a cache of their own
    return target


def _fetch(url: str, target: Path) -> None:
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(target), progress=get_rank() == 0)
    except OSError as error:  # URLError and HTTPError are some
        raise OSError(f'Pretrained: checkpoint must be a URL that can be fetched, got {url}: '
                      f'{error}. Download it by hand and give the path instead') from None
