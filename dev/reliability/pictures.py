# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What becomes of odd images in the pipeline of a detector, and in a backbone.

python dev/reliability/pictures.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from mmdet.utils import register_all_modules
from mmengine.dataset import Compose
from mmengine.registry import MODELS
from PIL import Image

import mmdcnv4.registration  # noqa: F401  registers the classes
from mmdcnv4.checks.samples import CheckedPipeline
from mmdcnv4.errors import UserError


def write(folder: Path) -> dict[str, Path]:
    """One file for each kind."""
    draw = np.random.default_rng(0)
    colour = draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    files = {}

    def save(name: str, image: Image.Image, extension: str, **options: object) -> None:
        files[name] = folder / f'{name.replace(" ", "-")}.{extension}'
        image.save(files[name], **options)

    save('ordinary', Image.fromarray(colour), 'jpg')
    save('gray', Image.fromarray(colour[..., 0]), 'png')
    save('RGBA', Image.fromarray(np.concatenate([colour, colour[..., :1]], 2)), 'png')
    save('16 bit', Image.fromarray(colour[..., 0].astype(np.uint16) * 257), 'png')
    save('palette', Image.fromarray(colour[..., 0]).convert('P'), 'png')
    save('1x1', Image.fromarray(colour[:1, :1]), 'png')
    save('5000x3000', Image.new('RGB', (5000, 3000), (9, 9, 9)), 'jpg')
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save('EXIF rotation', Image.fromarray(colour), 'jpg', exif=exif.tobytes())
    for name, part in (('truncated at half', 2), ('truncated at a tenth', 10)):
        content = files['ordinary'].read_bytes()
        files[name] = folder / f'{name.replace(" ", "-")}.jpg'
        files[name].write_bytes(content[:len(content) // part])
    files['empty'] = folder / 'empty.jpg'
    files['empty'].write_bytes(b'')
    return files


def main() -> int:
    """Prints the table."""
    register_all_modules()
    torch.set_num_threads(1)
    pipeline = CheckedPipeline(Compose([
        dict(type='LoadImageFromFile'), dict(type='Resize', scale=(128, 96), keep_ratio=True),
        dict(type='PackDetInputs', meta_keys=('img_path', 'ori_shape', 'img_shape'))]))
    model = MODELS.build(dict(type='FlashInternImage', channels=16, depths=(1, 1, 1, 1),
                              groups=(1, 2, 4, 8))).eval()
    with tempfile.TemporaryDirectory() as folder:
        for name, file in write(Path(folder)).items():
            try:
                sample = pipeline(dict(img_path=str(file), img_id=0))
                image = sample['inputs']
                with torch.no_grad():
                    outs = model(image[None].float() / 255)
                shape = sample['data_samples'].ori_shape
                is_finite = all(out.isfinite().all() for out in outs)
                print(f'| {name} | read as {shape[0]} x {shape[1]}, {image.shape[0]} channels '
                      f'{image.dtype}; {"finite" if is_finite else "NOT FINITE"} |')
            except UserError as error:
                print(f'| {name} | {str(error).replace(folder, "...")} |')
    return 0


if __name__ == '__main__':
    sys.exit(main())
