# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Shows where the DCNv4 and DCNv3 layers of a model sample.

python tools/analysis_tools/visualize_offsets.py CONFIG CHECKPOINT IMAGE --out offsets.png

The upper row shows, for the last layer of every stage, the samples of one output pixel on the
image: a dot per tap and group, its area the size of the mask, its colour the sign. The lower row
shows how far the samples of all pixels lie from their place in the resting kernel, in pixels of
that layer's map. The numbers go to the screen as well.

python tools/analysis_tools/visualize_offsets.py --grid kernel_size=3 offset_scale=2 --out grid.png

draws the resting kernel of one layer instead; options are those of `mmdcnv4.ops.DCNv4`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest.mock import patch

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import mmdcnv4  # noqa: F401  registers the classes
from mmdcnv4.checks.checkpoints import check_checkpoint
from mmdcnv4.checks.weights import Shapes, check_match
from mmdcnv4.cli.analysis import ModelPart
from mmdcnv4.cli.arguments import OptionsAction, add_config_arguments
from mmdcnv4.cli.config import read_config
from mmdcnv4.cli.explain import explain
from mmdcnv4.cli.preflight import PICTURE_ENDINGS, check_file
from mmdcnv4.errors import UserError, user_errors
from mmdcnv4.models.checkpoint import find_state_dict, read_file
from mmdcnv4.models.layers import dcnv3 as dcnv3_module
from mmdcnv4.models.layers.dcnv3 import DCNv3
from mmdcnv4.ops import DCNv4
from mmdcnv4.ops import module as dcnv4_module
from mmdcnv4.ops.contract import Geometry, make_geometry, output_size
from mmdcnv4.ops.functional import apply_geometry


class Samples(NamedTuple):
    """Where one layer samples.

    Attributes:
        name: of the layer.
        geometry: of the layer.
        input_size: (H, W) of its input.
        offset: learned offsets after scaling, in pixels of the input, (Ho, Wo, G, K, 2) in x, y.
        mask: (Ho, Wo, G, K).
    """

    name: str
    geometry: Geometry
    input_size: tuple[int, int]
    offset: Tensor
    mask: Tensor

    def positions(self, row: int, column: int) -> Tensor:
        """Samples of one output pixel, (G, K, 2) in x, y, in pixels of the input."""
        return resting_positions(self.geometry, row, column) + self.offset[row, column]

    def distances(self) -> Tensor:
        """Length of every offset, one-dimensional."""
        return self.offset.norm(dim=-1).flatten()

    def far_share(self, reach: float = 2.0) -> float:
        """Share of the samples that are not within `reach` pixels of the centre of their kernel.

        On both axes from -reach up to, not including, reach: there the tensor-core kernels are
        fast, see csrc/README.md.
        """
        moves = self.offset + (resting_positions(self.geometry, 0, 0)
                               - resting_centre(self.geometry, 0, 0))
        return ((moves < -reach) | (moves >= reach)).any(-1).double().mean().item()


def resting_centre(geometry: Geometry, row: int, column: int) -> Tensor:
    """Middle of the kernel of one output pixel: (2,) in x, y."""
    return torch.tensor([
        column * geometry.stride[1] - geometry.padding[1] + geometry.center[1],
        row * geometry.stride[0] - geometry.padding[0] + geometry.center[0]])


def resting_positions(geometry: Geometry, row: int, column: int) -> Tensor:
    """Samples of one output pixel without learned offsets: (K, 2) in x, y."""
    taps = torch.tensor([[i * geometry.dilation[1] - geometry.center[1],
                          j * geometry.dilation[0] - geometry.center[0]]
                         for j, i in geometry.taps()])
    return resting_centre(geometry, row, column) + taps * geometry.offset_scale


def unpack(name: str, geometry: Geometry, value: Tensor, offset_mask: Tensor) -> Samples:
    """Reads the first image of a call of the operator."""
    used = offset_mask[0, ..., :3 * geometry.groups * geometry.points].float()
    used = used.unflatten(-1, (geometry.groups, 3 * geometry.points))
    offset = used[..., :2 * geometry.points].unflatten(-1, (geometry.points, 2))
    mask = used[..., 2 * geometry.points:]
    return Samples(name, geometry, tuple(value.shape[1:3]), offset * geometry.offset_scale,
                   mask.softmax(-1) if geometry.softmax else mask)


def record(model: nn.Module, images: Tensor) -> list[Samples]:
    """Runs the model and returns what every layer asked of the operator, for the first image."""
    current: list[str] = []
    found: list[Samples] = []

    def recording(value: Tensor, offset_mask: Tensor, geometry: Geometry) -> Tensor:
        found.append(unpack(current[-1], geometry, value, offset_mask))
        return apply_geometry(value, offset_mask, geometry)

    def recording_options(value: Tensor, offset_mask: Tensor, **options: Any) -> Tensor:
        return recording(value, offset_mask, make_geometry(**options))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (DCNv4, DCNv3)):
            handles.append(module.register_forward_pre_hook(
                lambda module, inputs, name=name: current.append(name)))
    try:
        with torch.no_grad(), patch.object(dcnv4_module, 'apply_geometry', recording), \
                patch.object(dcnv3_module, 'dcnv4', recording_options):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def last_of_each_size(samples: Sequence[Samples]) -> list[Samples]:
    """The last layer at every size of map."""
    return list({item.input_size: item for item in samples}.values())


def report(samples: Sequence[Samples]) -> str:
    """A line per layer: quantiles of the distances, mean mask, share of far samples."""
    lines = [f'{"layer":40s}{"map":>10s}{"median":>9s}{"95 %":>9s}{"max":>9s}{"|mask|":>9s}'
             f'{"far":>8s}']
    for item in samples:
        distances = item.distances()
        middle, far = np.quantile(distances.numpy(), (0.5, 0.95))
        size = '{}x{}'.format(*item.input_size)
        lines.append(f'{item.name:40s}{size:>10s}{middle:9.2f}{far:9.2f}'
                     f'{distances.max():9.2f}{item.mask.abs().mean():9.3f}'
                     f'{100 * item.far_share():6.1f} %')
    return '\n'.join(lines)


def draw_samples(samples: Sequence[Samples], image: np.ndarray, point: tuple[float, float],
                 out: Path) -> None:
    """Draws samples on the image above histograms of distances.

    Args:
        samples: one column each.
        image: (H, W, 3), RGB, the one that the model saw.
        point: (x, y) in fractions of the image: the output pixel nearest to it is shown.
        out: file to write.
    """
    figure = Figure(figsize=(4 * len(samples), 7), layout='constrained')
    axes = figure.subplots(2, len(samples), squeeze=False)
    for item, (upper, lower) in zip(samples, axes.T):
        rows, columns = item.offset.shape[:2]
        row, column = int(point[1] * (rows - 1)), int(point[0] * (columns - 1))
        stride = image.shape[0] / item.input_size[0]
        place = (item.positions(row, column).flatten(0, 1) + 0.5) * stride - 0.5
        weight = item.mask[row, column].flatten()
        strongest = float(weight.abs().max()) or 1.0
        upper.imshow(image)
        upper.scatter(place[:, 0], place[:, 1], s=4 + 40 * weight.abs() / strongest, c=weight,
                      cmap='coolwarm', vmin=-strongest, vmax=strongest, linewidths=0)
        upper.set_xlim(0, image.shape[1])
        upper.set_ylim(image.shape[0], 0)
        upper.set_title(f'{item.name}\nstride {stride:.0f}', fontsize=8)
        upper.set_axis_off()
        lower.hist(item.distances().numpy(), bins=50, log=True)
        lower.set_xlabel('distance from the resting place, pixels of the map', fontsize=8)
    axes[1, 0].set_ylabel('samples')
    figure.savefig(out, dpi=120)


def draw_grid(options: dict[str, Any], out: Path) -> None:
    """Draws the resting kernel of a layer around its output pixel."""
    known = dict(kernel_size=3, stride=1, padding=1, dilation=1, offset_scale=1.0,
                 remove_center=False)
    options = {('padding' if key == 'pad' else key): value for key, value in options.items()}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f'--grid: options must be among pad and {sorted(known)}, got {unknown}')
    geometry = user_errors(make_geometry)(groups=1, **{**known, **options})
    size = 15
    row, column = (side // 2 for side in output_size(size, size, geometry))
    place = resting_positions(geometry, row, column)
    figure = Figure(figsize=(4, 4), layout='constrained')
    axis = figure.subplots()
    axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect='equal',
             xticks=np.arange(size + 1) - 0.5, yticks=np.arange(size + 1) - 0.5)
    axis.grid(color='0.85')
    axis.tick_params(labelbottom=False, labelleft=False, length=0)
    axis.scatter(place[:, 0], place[:, 1], s=110, color='tab:blue')
    for number, (x, y) in enumerate(place.tolist()):
        axis.annotate(str(number), (x, y), color='white', ha='center', va='center', fontsize=7)
    axis.set_title(', '.join(f'{key}={value}' for key, value in options.items()) or 'defaults',
                   fontsize=9)
    figure.savefig(out, dpi=120)


def prepare_image(path: str, longest: Optional[int], preprocessor: dict
                  ) -> tuple[np.ndarray, Tensor]:
    """Reads an image: RGB (H, W, 3), and normalised as the model wants it (1, 3, H, W).

    Args:
        path: of the image.
        longest: side to scale it to; None leaves it as it is.
        preprocessor: `data_preprocessor` of the config, for mean, std and the order of colours.
    """
    image = cv2.imread(path)
    if image is None:
        raise UserError(f'IMAGE must be a picture, got {path}')
    if longest is not None:
        scale = longest / max(image.shape[:2])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    is_rgb = preprocessor.get('bgr_to_rgb') or preprocessor.get('to_rgb')  # mmpretrain's name
    normalised = rgb if is_rgb else image
    if preprocessor.get('mean') is not None:
        normalised = (normalised - np.array(preprocessor['mean'])) / np.array(preprocessor['std'])
    return rgb, torch.from_numpy(normalised.astype(np.float32)).permute(2, 0, 1)[None]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument('checkpoint', nargs='?', help='of that config')
    parser.add_argument('image', nargs='?')
    parser.add_argument('--out', type=Path, required=True, help='picture to write')
    parser.add_argument('--point', type=float, nargs=2, default=(0.5, 0.5), metavar=('X', 'Y'),
                        help='output pixel to show, in fractions of the image')
    parser.add_argument('--size', type=int,
                        help='scale the longest side of the image to it; default: as it is')
    parser.add_argument('--grid', nargs='*', action=OptionsAction, metavar='OPTION=VALUE',
                        help='draw the resting kernel of a layer with these options')
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    if (args.grid is None) == (args.image is None):
        parser.error('give CONFIG CHECKPOINT IMAGE, or --grid')
    if args.size is not None and args.size < 1:
        parser.error(f'--size must be positive, got {args.size}')
    if not all(0 <= value <= 1 for value in args.point):
        parser.error(f'--point takes fractions, got {args.point}')
    return args


def draw(args: argparse.Namespace) -> None:
    """Draws what the arguments ask for, and prints the statistics of every layer."""
    if args.grid is not None:
        draw_grid(args.grid, args.out)
        return
    cfg = read_config(args.config, args.cfg_options)
    check_checkpoint(args.checkpoint, 'checkpoint')
    model = ModelPart(cfg, 'backbone').eval()
    image, images = prepare_image(args.image, args.size,
                                  cfg.model.get('data_preprocessor') or {})
    weights = dict(find_state_dict(read_file(args.checkpoint), args.checkpoint))
    check_match(model.model, Shapes(weights), args.checkpoint, cfg)
    model.model.load_state_dict(weights)
    samples = record(model.model.backbone, images)
    if not samples:
        raise UserError('the backbone must have DCNv4 or DCNv3 layers, found none')
    print(report(samples))
    draw_samples(last_of_each_size(samples), image, tuple(args.point), args.out)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draws a model or a kernel."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        check_file(str(args.out), '--out', PICTURE_ENDINGS)
        draw(args)


if __name__ == '__main__':
    main()
