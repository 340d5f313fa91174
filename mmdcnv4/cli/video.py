# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Writes a video and reads it again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Optional

import cv2
import numpy as np

from ..errors import UserError

_CODEC = 'mp4v'


def _opencv(path: str, fps: float, size: tuple[int, int]) -> Optional[Any]:
    """A writer of OpenCV, None where its build has no encoder."""
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*_CODEC), fps, size)
    return writer if writer.isOpened() else None


def _imageio(path: str, fps: float, size: tuple[int, int]) -> Optional[Any]:
    """A writer of imageio, None where it or ffmpeg is not installed."""
    try:
        import imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        return None
    return imageio.get_writer(path, fps=fps, codec='libx264', macro_block_size=2)


def _open(path: str, fps: float, size: tuple[int, int]
          ) -> tuple[Callable[[np.ndarray], None], Callable[[], None]]:
    """How to write an RGB picture, and how to close the file."""
    writer = _opencv(path, fps, size)
    if writer is not None:
        return (lambda picture: writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)),
                writer.release)
    writer = _imageio(path, fps, size)
    if writer is None:
        raise UserError(f'no video can be written: OpenCV {cv2.__version__} has no encoder '
                        f'{_CODEC}, and imageio with imageio-ffmpeg is not installed; '
                        'pip install imageio imageio-ffmpeg')
    return writer.append_data, writer.close


def read_video(path: str) -> tuple[int, tuple[int, int]]:
    """Number of frames that can be decoded, and (height, width); (0, (0, 0)) if there is none."""
    capture = cv2.VideoCapture(path)
    count, size = 0, (0, 0)
    while True:
        is_there, frame = capture.read()
        if not is_there:
            break
        count, size = count + 1, (frame.shape[0], frame.shape[1])
    capture.release()
    return count, size


def write_video(path: str, pictures: Iterable[np.ndarray], fps: float) -> int:
    """Writes an MP4 file, and decodes it to see that every picture is in it.

    The file gets its name when it is whole; one that was there stays until then.

    Args:
        path: ends in `.mp4`.
        pictures: RGB, uint8, all of one shape (H, W, 3) with even sides.
        fps: pictures per second.

    Returns:
        The number of pictures.

    Raises:
        UserError: there is no encoder, no picture, or not every picture is in the file.
        ValueError: a picture has another shape than the first.
    """
    part = str(Path(path).with_suffix('.part.mp4'))
    write: Optional[Callable[[np.ndarray], None]] = None
    close: Optional[Callable[[], None]] = None
    count = 0
    shape: tuple[int, ...] = ()
    try:
        for picture in pictures:
            if write is None:
                shape = picture.shape
                write, close = _open(part, fps, (shape[1], shape[0]))
            if picture.shape != shape:
                raise ValueError(f'pictures must have one shape, {shape}, got {picture.shape}')
            write(picture)
            count += 1
        if close is None:
            raise UserError(f'no picture to write to {path}')
        close()
        close = None
        found = read_video(part)
        if found != (count, shape[:2]):
            raise UserError(f'the video {path} should have {count} pictures of {shape[:2]} pixels,'
                            f' and {found[0]} of {found[1]} can be read; is the disk full?')
        os.replace(part, path)
    finally:
        if close is not None:
            close()
        Path(part).unlink(missing_ok=True)
    return count
