# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What `torch.export` takes of BEVFormer v2: backbone and neck, and a whole model of one frame."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InvalidValue
from .models.detector import BEVFormerV2


class ImagePart(nn.Module):
    """Backbone and neck of a detector, from images to feature maps; for any number of frames.

    Args:
        model: a `BEVFormerV2`; export it in evaluation mode.

    Example:
        >>> images = torch.rand(6, 3, 640, 1600)
        >>> batch = torch.export.Dim('batch', min=2, max=48)
        >>> program = torch.export.export(
        ...     ImagePart(model).eval(), (images,), dynamic_shapes=({0: batch},))
        >>> maps = program.module()(images)
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.img_backbone, self.img_neck = model.img_backbone, model.img_neck

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps of images.

        Args:
            images: shape (N, 3, H, W), normalised as the data preprocessor does; H and W are
                multiples of 32.

        Returns:
            One map (N, C, H / s, W / s) per level, s = 8, 16, 32, ...
        """
        return tuple(self.img_neck(self.img_backbone(images)))


class SingleFrame(nn.Module):
    """A model of one frame and one stage, from images and matrices to logits and box codes.

    The exported graph takes other matrices than it was exported with: how many cells a camera sees
    stays open.

    Args:
        model: a `BEVFormerV2` with `frames=(0,)`; export it in evaluation mode, without gradient.

    Raises:
        ValueError: the model has several frames, or queries of a first stage.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if tuple(model.frames) != (0,):
            raise InvalidValue('SingleFrame: model.frames must be (0,), got '
                               f'{tuple(model.frames)}; of several frames export ImagePart')
        if type(model)._extra_queries is not BEVFormerV2._extra_queries:
            raise InvalidValue('SingleFrame: model must be a BEVFormerV2 of one stage, got '
                               f'{type(model).__name__}')
        self.image_part, self.num_levels = ImagePart(model), model.num_bev_levels
        self.bev_encoder, self.bev_head = model.bev_encoder, model.bev_head

    def forward(self, images: Tensor, lidar2img: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs of the last decoder layer.

        Args:
            images: shape (B, V, 3, H, W), normalised, H and W multiples of 32.
            lidar2img: shape (B, V, 4, 4): LiDAR frame to pixels of these images.

        Returns:
            Class logits (B, Q, classes) and box codes (B, Q, 10): x, y of the centre, log length,
            log width, z of the centre, log height, sine and cosine of the yaw, velocity x, y.
        """
        maps = [x.unflatten(0, images.shape[:2])
                for x in self.image_part(images.flatten(0, 1))[:self.num_levels]]
        bev = self.bev_encoder(maps, lidar2img, images.shape[-2:])
        logits, codes = self.bev_head(bev, None)
        return logits[-1], codes[-1]
