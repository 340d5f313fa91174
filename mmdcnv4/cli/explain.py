# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""How a program ends that fails.

An error in what the user gave, a :class:`mmdcnv4.errors.UserError`, ends it in one clear line; its
traceback goes to the log of the run. Every other exception keeps its traceback, in the log too,
and may get a last line that begins with "hint:". A hint rests on the type of the exception and on
what it carries, never on its text, and adds to it, never replaces.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry.build_functions import build_from_cfg

from .. import registration
from ..checks.config import LIBRARIES, walk
from ..engine.hooks.progress import close_bar
from ..errors import chain, find_user_error, message_of


def _entries_with(cfg: Config, file: str) -> str:
    """Where the config names a file, or a folder above it."""
    for path, node in walk(cfg._cfg_dict):
        for key, value in node.items():
            if isinstance(value, str) and len(value) > 1 and (
                    file == value or file.startswith(value.rstrip('/') + '/')):
                return f'{path}.{key}'.lstrip('.')
    return ''


def _hint_missing_file(error: FileNotFoundError, cfg: Optional[Config]) -> Optional[str]:
    if not isinstance(error.filename, (str, Path)):
        return None
    file = str(error.filename)
    entry = '' if cfg is None else _entries_with(cfg, file)
    return (f'{file} does not exist (working directory {os.getcwd()})'
            + (f'; {entry} of the config leads there' if entry else ''))


def _hint_broken_json(cfg: Optional[Config]) -> Optional[str]:
    """The first JSON file of the config that cannot be parsed."""
    for _, node in walk({} if cfg is None else cfg._cfg_dict):
        file = os.path.join(str(node.get('data_root') or ''), str(node.get('ann_file') or ''))
        if file.endswith('.json') and os.path.isfile(file):
            try:
                json.loads(Path(file).read_bytes())
            except ValueError as error:
                return f'{file} is no JSON file: {error}'
    return None


def _hint_registry(error: BaseException) -> Optional[str]:
    """What this package could not register, where mmengine does not find a type."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames or frames[-1].f_code is not build_from_cfg.__code__ or not registration.skipped:
        return None
    reasons = '; '.join(f'{name}: {why}' for name, why in registration.skipped.items())
    return f'mmdcnv4 did not register all of its classes: {reasons}'


def _silence_workers() -> None:
    """Keeps torch's signal handler from raising for the rest of a program that is failing.

    It does so wherever a program stands when a worker of a data loader dies, and the program
    often hears of that by a broken pipe first. It would cut off the explanation, or Python while
    that prints the traceback.
    """
    for _ in range(2):  # what the first one raises is what was waiting
        with suppress(AttributeError, RuntimeError, ValueError):  # no SIGCHLD; not the main thread
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _hint_process(error: BaseException) -> Optional[str]:
    """Where torch waited for another process: a worker of a data loader, or one of a run."""
    places = [frame.f_globals.get('__name__', '') for frame, _ in
              traceback.walk_tb(error.__traceback__)]
    place = places[-1] if places else ''
    is_cut = isinstance(error, (EOFError, ConnectionError)) and any(
        name.startswith('torch.utils.data.') for name in places)
    if is_cut or place.startswith('torch.utils.data.'):
        return ('a worker of the data loader ended or hangs. The kernel kills one when memory is '
                'short (`dmesg`): try fewer num_workers or a smaller batch, and continue a '
                'training with --resume')
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and \
            place.startswith(('torch.distributed.', 'torch.nn.parallel.', 'torch.autograd.')):
        return (f'this is process {dist.get_rank()} of {dist.get_world_size()}. If another one '
                'was killed, failed or hangs, this one cannot go on: the first error in the '
                'output of the others is the cause. Continue a training with --resume')
    return None


def hint(error: BaseException, cfg: Optional[Config] = None) -> Optional[str]:
    """What may help with an exception that is not known to be the user's fault.

    Args:
        error: of a run; what led to it counts as well.
        cfg: the config of the run.
    """
    for link in chain(error):
        found: Optional[str] = None
        if isinstance(link, FileNotFoundError):
            found = _hint_missing_file(link, cfg)
        elif isinstance(link, OSError) and link.errno == errno.ENOSPC:
            found = 'the disk is full; free some space, and continue a training with --resume'
        elif isinstance(link, json.JSONDecodeError):
            found = _hint_broken_json(cfg)
        elif isinstance(link, ModuleNotFoundError):
            library = str(link.name).split('.')[0]
            found = f'{library} is not installed' if library in ('mmcv', *LIBRARIES) else None
        elif isinstance(link, KeyError):
            found = _hint_registry(link)
        elif isinstance(link, (RuntimeError, EOFError, ConnectionError)):
            found = _hint_process(link)
        if found:
            return found
    return None


def _log_traceback(error: BaseException, cfg: Optional[Config]) -> None:
    """Writes the traceback into the log file of the run, if there is one already."""
    work_dir = None if cfg is None else cfg.get('work_dir')
    if work_dir is None:
        return
    text = ''.join(traceback.format_exception(type(error), error, error.__traceback__))
    for logger in list(MMLogger._instance_dict.values()):
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler) and \
                    Path(work_dir).resolve() in Path(handler.baseFilename).resolve().parents:
                handler.emit(logging.LogRecord(logger.name, logging.ERROR, __file__, 0, text, None,
                                               None))
                handler.flush()


def _add_last_line(error: BaseException, line: str) -> None:
    """Has Python print a line below the traceback."""
    if hasattr(error, 'add_note'):  # Python >= 3.11
        error.add_note(line)
        return
    show = sys.excepthook

    def show_with_line(*arguments: Any) -> None:
        show(*arguments)
        print(line, file=sys.stderr)

    sys.excepthook = show_with_line


def _watch(cfg: Optional[Config]) -> Callable[[], None]:
    """Explains an exception that ends the program before :func:`explain` hears of it: torch's
    handler for dead workers may raise while the `with` statement is left. Returns how to stop."""
    show = sys.excepthook

    def show_and_explain(kind: type[BaseException], error: BaseException, place: Any) -> None:
        _silence_workers()
        line = hint(error, cfg)
        _log_traceback(error, cfg)
        show(kind, error, place)
        if line:
            print(f'hint: {line}', file=sys.stderr)

    def stop() -> None:
        if sys.excepthook is show_and_explain:
            sys.excepthook = show
    sys.excepthook = show_and_explain
    return stop


@contextmanager
def explain(cfg: Optional[Config] = None, debug: bool = False) -> Iterator[None]:
    """Ends the program with one clear last line where what the user gave is at fault.

    Args:
        cfg: the config of the run.
        debug: let a user error pass as well, with its traceback.

    Raises:
        SystemExit: with the message of a user error.
    """
    stop_watching = _watch(cfg)
    try:
        yield
        stop_watching()
    except (SystemExit, KeyboardInterrupt):
        stop_watching()
        raise
    except Exception as error:
        try:  # a function begins with the signals that wait
            _silence_workers()
        except RuntimeError:
            _silence_workers()
        stop_watching()
        close_bar()  # it would stand in the middle of the text
        _log_traceback(error, cfg)
        fault = find_user_error(error)
        line = None if fault is not None else hint(error, cfg)
        if fault is not None and not debug:
            raise SystemExit(f'error: {message_of(fault)}') from error
        if line:
            _add_last_line(error, f'hint: {line}')
        raise
    finally:
        close_bar()
