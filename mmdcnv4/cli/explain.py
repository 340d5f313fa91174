# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What an exception of a run means to its user.

`explain` turns exceptions that come from the user's files into a `UserError`'s one clear line.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from mmengine.config import Config

from .. import registration
from ..engine.hooks.progress import close_bar
from .preflight import OUR_TYPES, UserError, annotation_files

# classes and modules whose errors name what the config or the data set holds
_OWN_MESSAGES = ('DCNv4', 'FlashInternImage', 'NuScenesTemporalDataset',
                 'LoadTemporalMultiViewImages', 'MultiViewCropResize', 'BEVFormerV2',
                 'BEVFormerV2Encoder', 'BEVFormerV2Head', 'PerspectiveHead', 'analysis')
_LIBRARIES = ('mmcv', 'mmdet', 'mmdet3d', 'mmpretrain', 'mmseg')
_IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
_MAX_FILES_TO_SEARCH = 50_000


def _broken_annotation(cfg: Config) -> Optional[str]:
    """The first annotation file that cannot be parsed, and why."""
    for _, file in annotation_files(cfg):
        try:
            if file.endswith('.json'):
                json.loads(Path(file).read_bytes())
            elif file.endswith('.pkl'):
                with open(file, 'rb') as stream:
                    pickle.load(stream)  # the data set has just done the same
        except (ValueError, EOFError, pickle.UnpicklingError) as error:
            return f'{file} ({error})'
        except OSError:
            continue
    return None


def _incomplete_annotation(cfg: Config, key: str) -> Optional[str]:
    """The first COCO-like annotation file without the list `key`."""
    for _, file in annotation_files(cfg):
        if file.endswith('.json') and os.path.isfile(file):
            content = json.loads(Path(file).read_bytes())
            if not isinstance(content, dict) or key not in content:
                return file
    return None


def _unreadable_image(cfg: Config) -> Optional[str]:
    """The first image or label map of the data sets that no decoder accepts."""
    import cv2  # only here: after a failure
    budget = _MAX_FILES_TO_SEARCH
    for _, folder in annotation_files(cfg):
        if not os.path.isdir(folder):
            continue
        for file in sorted(Path(folder).rglob('*')):
            if file.suffix.lower() not in _IMAGE_SUFFIXES:
                continue
            budget -= 1
            if budget < 0:
                return None
            if cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) is None:
                return str(file)
    return None


def _explain_import(text: str) -> Optional[str]:
    match = re.search(r"(\w+) is not in the ([\w:-]+ ?[\w:-]*) registry", text)
    if match is None:
        return None
    skipped = registration.skipped
    reasons = ''.join(f'\n    {name}: {why}' for name, why in skipped.items())
    return (f'{match[1]} is in no registry: check the spelling of the type, default_scope and '
            'custom_imports in the config.'
            + (f' Classes of mmdcnv4 that were not registered:{reasons}' if reasons else ''))


def _explain_own(text: str) -> Optional[str]:
    """What classes of this package and a hook of mmdet say of the config and the data."""
    # str() of a KeyError has quotes around its message
    own = re.findall(rf"(['\"]?)\b((?:{'|'.join(_OWN_MESSAGES)}): .+)\1$", text, re.MULTILINE)
    if own:
        return own[-1][1]
    match = re.search(r'The `num_classes` \((\d+)\) in (\w+) of .* `classes` (\d+)\) in (\w+)',
                      text)
    if match is None:
        return None
    return (f'{match[2]} has num_classes {match[1]}, {match[4]} has {match[3]} classes: set '
            'metainfo.classes of the data sets and num_classes of every head alike.')


def _explain_argument(text: str) -> Optional[str]:
    """An argument that a class of this package does not have, often one of an inherited config."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    name = match and {'DCNv4Conv2d': 'DCNv4'}.get(match[1], match[1])
    if match is None or name not in {*OUR_TYPES, *_OWN_MESSAGES}:
        return None
    return (f'{name} has no argument {match[2]}. If it comes from an inherited config, replace '
            f"that entry as a whole: dict(_delete_=True, type='{name}', ...).")


def translate(error: BaseException, cfg: Optional[Config] = None) -> Optional[str]:
    """What an exception of a run means to its user; None when it is not known to be theirs.

    Args:
        error: the exception, also one that a worker process of a data loader has wrapped.
        cfg: the config of the run, to find the file that is broken.
    """
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    own = _explain_own(text) or _explain_argument(text)
    if own:
        return own
    names = re.findall(r'failed to load image: ([^{\n]+)$', text, re.MULTILINE)
    if names:
        return f'cannot read the image {names[-1].strip()}: the file is empty or corrupt.'
    if 'need at least one array to concatenate' in text:
        return ('a data set has no image left. Check that its folders hold images, and that '
                'metainfo.classes are the category names of its annotation file.')
    if 'Cannot find valid image after' in text:
        return ('the pipeline of the training data leaves no object in any sample that was tried. '
                'Check metainfo.classes, point_cloud_range, and that the annotation file holds '
                'objects.')
    match = re.search(r"No such file or directory: ['\"](.+?)['\"]", text)
    if match:
        return f'the file {match[1]} does not exist.'
    if isinstance(error, ModuleNotFoundError):
        library = str(error.name).split('.')[0]
        if library in _LIBRARIES:
            return f'the config needs {library}, which is not installed.'
    match = re.search(r'expected scalar type Float but found (\w+)', text)
    if match:
        return (f'an operator of the model does not compute in {match[1].lower()} on this device; '
                'leave out --amp.')
    if re.search(r'No space left on device', text):
        return 'the disk is full; free some space and continue with --resume.'
    if cfg is None:
        return _explain_import(text)
    if re.search('PytorchStreamReader|Weights only load failed', text):
        file = cfg.get('load_from')
        if file is not None and not zipfile.is_zipfile(file):
            return f'the checkpoint {file} is no checkpoint.'
        return (f'the checkpoint {file} holds objects that are neither weights nor what MMEngine '
                'saves. It could run code, so it is refused.')
    if re.search('JSONDecodeError|UnpicklingError|EOFError|UnicodeDecodeError',
                 f'{type(error).__name__} {text}'):
        broken = _broken_annotation(cfg)
        if broken:
            return f'cannot read the annotation file {broken}: the file is corrupt.'
    match = re.search(r"^'(images|annotations|categories)'$", text, re.MULTILINE)
    if match:
        broken = _incomplete_annotation(cfg, match[1])
        if broken:
            return (f'the annotation file {broken} has no list {text}: COCO files hold images, '
                    'annotations and categories.')
    if re.search('UnidentifiedImageError|cannot identify image file|NoneType|buf.empty', text):
        broken = _unreadable_image(cfg)
        if broken:
            return f'cannot read the image {broken}: the file is empty or corrupt.'
    return _explain_import(text)


@contextmanager
def explain(cfg: Optional[Config] = None, debug: bool = False) -> Iterator[None]:
    """Ends the program with one clear last line where the user's files are at fault.

    Args:
        cfg: the config of the run.
        debug: let the exception pass, with its traceback.

    Raises:
        SystemExit: with the message.
    """
    try:
        yield
    except Exception as error:
        message = None if debug else translate(error, cfg)
        if message is None:
            raise
        raise SystemExit(f'error: {message}') from None
    finally:
        close_bar()
