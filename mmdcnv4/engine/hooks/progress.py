# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A progress bar for the person who waits."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, Optional

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

_PLAIN_PROGRESS = re.compile(r'(Iter|Epoch)\((train|val|test)\) .*\beta:|Exp name:')


def _is_not_plain_progress(record: logging.LogRecord) -> bool:
    """Lets through everything but MMEngine's own progress lines, which the bar replaces."""
    return _PLAIN_PROGRESS.match(record.getMessage()) is None


def _is_terminal(stream: Any) -> bool:
    """Whether a stream is one; programs put None or what only writes in the place of stdout."""
    isatty = getattr(stream, 'isatty', None)
    return callable(isatty) and bool(isatty())


def close_bar() -> None:
    """Takes away the bar that an exception left open, and shows the cursor again."""
    if ProgressBarHook.shown is not None:
        ProgressBarHook.shown._stop()


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """A bar with the time left, loss and learning rate, on a terminal.

    Where standard output is no terminal, `rich` is not installed, or the process is not the first
    of a distributed run, the hook does nothing and MMEngine prints its log lines. The log file
    holds them in any case.

    Args:
        refresh_per_second: how often the bar is drawn.
    """

    priority = 'VERY_LOW'
    shown: ClassVar[Optional[ProgressBarHook]] = None  # a terminal has room for one

    def __init__(self, refresh_per_second: float = 4.0) -> None:
        self.refresh_per_second = refresh_per_second
        self._progress: Optional[Any] = None
        self._task: Optional[int] = None
        self._train_task: Optional[int] = None
        self._handlers: list[tuple[logging.StreamHandler, Any]] = []

    def _start(self, runner: Any) -> None:
        """Opens the bar, if there is a place for it."""
        if self._progress is not None or not is_main_process() or not _is_terminal(sys.stdout):
            return
        try:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
        except ModuleNotFoundError:
            return
        self._progress = Progress(
            TextColumn('{task.description}'), BarColumn(bar_width=None), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn(),
            TextColumn('{task.fields[values]}'), refresh_per_second=self.refresh_per_second,
            expand=True)  # the bar takes the room that the numbers leave
        self._progress.start()
        ProgressBarHook.shown = self
        # log lines go through the bar's console from now on, which prints them above the bar
        for handler in runner.logger.handlers:
            if type(handler) is logging.StreamHandler:
                self._handlers.append((handler, handler.setStream(sys.stdout)))
                handler.addFilter(_is_not_plain_progress)

    def _stop(self) -> None:
        if self._progress is None:
            return
        self._progress.stop()
        for handler, stream in self._handlers:
            handler.removeFilter(_is_not_plain_progress)
            if stream is not None:
                handler.setStream(stream)
        self._handlers.clear()
        self._progress = self._task = self._train_task = ProgressBarHook.shown = None

    @staticmethod
    def _train_values(runner: Any) -> str:
        """The mean loss since the last log line was written, and the learning rate."""
        scalars = runner.message_hub.log_scalars
        values = []
        if 'train/loss' in scalars:
            values.append(f'loss {scalars["train/loss"].mean(10):.3f}')
        if 'train/lr' in scalars:
            values.append(f'lr {scalars["train/lr"].current():.2g}')
        return '  '.join(values)

    def before_train(self, runner: Any) -> None:
        """Opens the bar over all iterations."""
        self._start(runner)
        if self._progress is not None:
            self._train_task = self._progress.add_task(
                'train', total=runner.max_iters, completed=runner.iter, values='')

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                         outputs: Optional[dict] = None) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._train_task, completed=runner.iter + 1,
                                  values=self._train_values(runner))

    def _before_evaluation(self, runner: Any, name: str, total: int) -> None:
        self._start(runner)
        if self._progress is not None:
            self._task = self._progress.add_task(name, total=total, values='')

    def _after_evaluation_iter(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)

    def _after_evaluation(self) -> None:
        if self._progress is None:
            return
        if self._train_task is None:
            self._stop()
        else:
            self._progress.remove_task(self._task)

    def before_val_epoch(self, runner: Any) -> None:
        """Opens a second bar below that of the training."""
        self._before_evaluation(runner, 'val', len(runner.val_dataloader))

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                       outputs: Optional[Sequence] = None) -> None:
        """Moves the second bar."""
        self._after_evaluation_iter()

    def after_val_epoch(self, runner: Any, metrics: Optional[dict] = None) -> None:
        """Takes the second bar away."""
        self._after_evaluation()

    def before_test_epoch(self, runner: Any) -> None:
        """Opens the bar of a test."""
        self._before_evaluation(runner, 'test', len(runner.test_dataloader))

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                        outputs: Optional[Sequence] = None) -> None:
        """Moves the bar of a test."""
        self._after_evaluation_iter()

    def after_test_epoch(self, runner: Any, metrics: Optional[dict] = None) -> None:
        """Closes the bar of a test."""
        self._after_evaluation()

    def after_run(self, runner: Any) -> None:
        """Leaves the terminal as it was."""
        self._stop()
