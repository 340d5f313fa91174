# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""BEVFormer v2: multi-camera 3-D detection with perspective supervision.

Source:   "BEVFormer v2: Adapting Modern Image Backbones to Bird's-Eye-View Recognition via
          Perspective Supervision", Yang et al., CVPR 2023, arXiv:2211.10439.
Differs:  one stage, as the published ResNet-50 results; other frames are encoded in the current
          LiDAR frame instead of warped; correct for any batch size; images are mirrored on the
          padded tensor, so that features and geometry stay aligned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np
import torch
from mmdet3d.models.detectors import Base3DDetector
from mmdet3d.registry import MODELS
from torch import Tensor, nn

from ...errors import InvalidValue
from ..geometry import to_device, warp_bev
from .attention import VisibleCells
from .bev_head import ExtraQueries
from .grid_mask import GridMask
from .map_cache import MapCache, frame_key


@contextmanager
def without_training(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; each module gets its own mode back.

    Under autocast the cache of cast weights is off: a weight cast without gradient must not be
    used again where there is one.
    """
    device = next(model.parameters()).device.type
    modes = {module: module.training for module in model.modules()}
    autocast = torch.autocast(device, enabled=torch.is_autocast_enabled(device),
                              dtype=torch.get_autocast_dtype(device), cache_enabled=False)
    for module in modes:  # not eval(), which means new weights to the cache of maps
        module.training = False
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Geometry:
    """What the samples of a batch say about cameras and augmentation, as tensors.

    Attributes:
        lidar2img: shape (B, T, V, 4, 4): current LiDAR frame to pixels of each frame.
        cam2img: shape (B, V, 3, 3).
        lidar2cam: shape (B, V, 4, 4).
        bda_mat: shape (B, 3, 3).
        frame_valid: shape (B, T).
        flip: shape (B,): whether to mirror the images; None if none is.
        frames: indices of the frames that some sample has.
        image_sizes: (height, width) in pixels of each sample's images, without padding.
    """

    lidar2img: Tensor
    cam2img: Tensor
    lidar2cam: Tensor
    bda_mat: Tensor
    frame_valid: Tensor
    flip: Optional[Tensor]
    frames: tuple[int, ...]
    image_sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, data_samples: Sequence[Any], device: torch.device) -> Geometry:
        """Stacks the metainfo of B samples; one copy to the device.

        Raises:
            ValueError: a matrix of a camera or of the augmentation has no inverse.
        """
        names = ('lidar2img', 'cam2img', 'lidar2cam', 'bda_mat', 'frame_valid', 'img_flip')
        arrays = {name: np.stack([np.asarray(sample.metainfo[name]) for sample in data_samples])
                  for name in names}
        for name in ('cam2img', 'lidar2cam', 'bda_mat'):
            if not np.all(np.abs(np.linalg.det(arrays[name].astype(np.float64))) > 0):
                raise InvalidValue(f'BEVFormerV2: {name} must have an inverse in every sample, '
                                   f'got {arrays[name].tolist()}')
        batch = len(data_samples)
        parts = [array.reshape(batch, -1).astype(np.float32) for array in arrays.values()]
        columns = to_device(np.concatenate(parts, 1), device).split(
            [part.shape[1] for part in parts], 1)
        tensors = {name: column.reshape(array.shape)
                   for (name, array), column in zip(arrays.items(), columns)}
        return cls(tensors['lidar2img'], tensors['cam2img'][..., :3, :3], tensors['lidar2cam'],
                   tensors['bda_mat'], tensors['frame_valid'].bool(),
                   tensors['img_flip'].bool() if arrays['img_flip'].any() else None,
                   tuple(np.flatnonzero(arrays['frame_valid'].any(0)).tolist()),
                   tuple((int(sample.img_shape[0]), int(sample.img_shape[1]))
                         for sample in data_samples))


@MODELS.register_module()
class BEVFormerV2(Base3DDetector):
    """Images of all cameras and frames to boxes in the LiDAR frame.

    Args:
        img_backbone: image backbone; its maps go to the neck.
        img_neck: feature pyramid; the first `num_bev_levels` maps go to the BEV encoder, all to
            the perspective head.
        bev_encoder: maps to BEV features, see `BEVFormerV2Encoder`.
        bev_head: BEV features to boxes, see `BEVFormerV2Head`.
        perspective_head: auxiliary head on the current images in training; None for none.
        temporal_fusion: needed exactly if there is more than one frame, see `TemporalFusion`.
        frames: offsets in key frames, ascending, 0 among them; those of the dataset.
        num_bev_levels: maps that the BEV encoder reads.
        grid_mask: arguments of :class:`GridMask`; None for none.
        cache_maps: keep the image maps of the last key frames in evaluation mode, for samples that
            come one by one in the order of their scene: of T frames only the newest goes through
            backbone and neck. The numbers are the same to the last bit. Frames are known by
            token and image transform: images must not change under the same token.
        mono_loss_weight: factor on the losses of the perspective head.
        data_preprocessor: of mmdet3d.
        init_cfg: of mmengine.

    Raises:
        ValueError: the message names the argument, the expectation and the value.
    """

    def __init__(self, img_backbone: dict, img_neck: dict, bev_encoder: dict, bev_head: dict,
                 perspective_head: Optional[dict] = None, temporal_fusion: Optional[dict] = None,
                 frames: Sequence[int] = (0,), num_bev_levels: int = 4,
                 grid_mask: Optional[dict] = None, mono_loss_weight: float = 1.0,
                 cache_maps: bool = False, data_preprocessor: Optional[dict] = None,
                 init_cfg: Union[dict, list, None] = None) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.frames = tuple(frames)
        if 0 not in self.frames or list(self.frames) != sorted(set(self.frames)):
            raise InvalidValue('BEVFormerV2: frames must be ascending and contain 0, got '
                               f'{self.frames}')
        if (temporal_fusion is None) != (len(self.frames) == 1):
            raise InvalidValue('BEVFormerV2: temporal_fusion must be given exactly if there is '
                               f'more than one frame, got {temporal_fusion} with frames '
                               f'{self.frames}')
        self.current = self.frames.index(0)
        self.num_bev_levels, self.mono_loss_weight = num_bev_levels, mono_loss_weight
        self.img_backbone = MODELS.build(img_backbone)
        self.img_neck = MODELS.build(img_neck)
        self.bev_encoder = MODELS.build(bev_encoder)
        self.bev_head = MODELS.build(bev_head)
        self.grid_mask = None if grid_mask is None else GridMask(**grid_mask)
        self.perspective_head = (
            None if perspective_head is None else MODELS.build(perspective_head))
        self.temporal_fusion = None if temporal_fusion is None else MODELS.build(
            dict(num_frames=len(self.frames), **temporal_fusion))
        self.map_cache = MapCache(
            self.frames[-1] - self.frames[0] + 1 if cache_maps and len(self.frames) > 1 else 0)
        self._check_ground_plane()

    def train(self, mode: bool = True) -> BEVFormerV2:
        """Sets the mode and forgets the cached maps: weights may have changed."""
        self.map_cache.clear()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.map_cache.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def _maps(self, images: Tensor, geometry: Geometry, frame: int,
              data_samples: Sequence[Any]) -> list[Tensor]:
        """Maps of a frame, from the cache if there is one sample: batches round differently."""
        def compute() -> list[Tensor]:
            return self.extract_feat(images[:, frame], geometry.flip)

        if len(data_samples) != 1:
            return compute()
        return self.map_cache.get(frame_key(data_samples[0], frame, images[:, frame]), compute)

    def _check_ground_plane(self) -> None:
        """Another range in one of the parts would train without an error, on shifted boxes."""
        for name in ('bev_size', 'embed_dims', 'pc_range'):
            parts = {part: getattr(self, part) for part in
                     ('bev_encoder', 'temporal_fusion', 'bev_head')}
            values = {part: getattr(module, name) for part, module in parts.items()
                      if hasattr(module, name)}
            # only x and y: pillars and boxes may have heights of their own
            seen = {v[:2] + v[3:5] if name == 'pc_range' else v for v in values.values()}
            if len(seen) > 1:
                raise InvalidValue(f'BEVFormerV2: {name} must be the same in '
                                   f'{" and ".join(values)}, got {values}')

    def extract_feat(self, images: Tensor, flip: Optional[Tensor] = None) -> list[Tensor]:
        """Feature maps of one frame.

        Args:
            images: shape (B, V, 3, H, W).
            flip: shape (B,): samples whose images are mirrored on the way through the network;
                None for none.

        Returns:
            One map (B, V, C, h, w) per level, not mirrored.
        """
        batch, views = images.shape[:2]
        if flip is not None:
            flip = flip.view(-1, 1, 1, 1, 1)
            images = torch.where(flip, images.flip(-1), images)
        maps = self.img_neck(self.img_backbone(images.flatten(0, 1)))
        maps = [x.unflatten(0, (batch, views)) for x in maps]
        return maps if flip is None else [torch.where(flip, x.flip(-1), x) for x in maps]

    def _look(self, geometry: Geometry, image_size: Sequence[int]) -> dict[int, VisibleCells]:
        """What the cameras see in each frame that some sample has."""
        matrices = [geometry.lidar2img[:, frame] for frame in geometry.frames]
        with torch.no_grad():
            seen = self.bev_encoder.look(matrices, image_size, geometry.image_sizes)
        return dict(zip(geometry.frames, seen))

    def _encode(self, maps: Sequence[Tensor], geometry: Geometry, frame: int,
                image_size: Sequence[int], cells: VisibleCells) -> Tensor:
        """BEV features (B, Hb * Wb, C) of the frame with this index."""
        return self.bev_encoder(maps[:self.num_bev_levels], geometry.lidar2img[:, frame],
                                image_size, geometry.image_sizes, cells)

    def _history(self, images: Tensor, geometry: Geometry, cells: dict[int, VisibleCells],
                 data_samples: Sequence[Any] = ()) -> dict[int, Tensor]:
        """BEV features, without gradient, of the other frames that some sample has."""
        others = {}
        with without_training(self):
            for frame in geometry.frames:
                if frame != self.current:
                    maps = self._maps(images, geometry, frame, data_samples)
                    others[frame] = self._encode(maps, geometry, frame, images.shape[-2:],
                                                 cells[frame])
        return others

    def _fuse(self, bev: Tensor, history: dict[int, Tensor], geometry: Geometry) -> Tensor:
        """One BEV map from those of all frames; a missing one repeats that nearer the present."""
        frames = {self.current: bev}
        for step in (-1, 1):
            frame = self.current + step
            while 0 <= frame < len(self.frames):
                nearer = frames[frame - step].detach()
                if frame in history:
                    is_valid = geometry.frame_valid[:, frame].view(-1, 1, 1)
                    frames[frame] = torch.where(is_valid, history[frame].to(bev.dtype), nearer)
                else:
                    frames[frame] = nearer
                frame += step
        ordered = [frames[frame] for frame in range(len(self.frames))]
        if self.training:
            encoder = self.bev_encoder
            ordered = [warp_bev(x, geometry.bda_mat, encoder.pc_range, encoder.bev_size)
                       for x in ordered]
        return ordered[0] if self.temporal_fusion is None else self.temporal_fusion(ordered)

    def _bev(self, inputs: dict, data_samples: Sequence[Any]
             ) -> tuple[Tensor, list[Tensor], Geometry]:
        """Fused BEV features (B, Hb * Wb, C), the maps of the current frame, the geometry."""
        images = inputs['imgs']
        frames = len(self.frames)
        if images.shape[1] % frames or tuple(data_samples[0].metainfo['frames']) != self.frames:
            raise InvalidValue(
                f'BEVFormerV2: inputs must hold the frames {self.frames} of the model, got '
                f'{images.shape[1]} images of frames {data_samples[0].metainfo["frames"]}; set '
                'frames alike in model and dataset')
        expected = getattr(self.perspective_head, 'classes', None)
        classes = data_samples[0].metainfo.get('classes')
        if expected is not None and classes is not None and tuple(classes) != expected:
            raise InvalidValue(
                  f'BEVFormerV2: perspective_head.classes must be the classes of the dataset, '
                  f'{tuple(classes)}, got {expected}; set model.perspective_head.classes to the '
                  'same list: sizes belong to names')
        images = images.unflatten(1, (frames, -1))  # (B, T, V, 3, H, W)
        geometry = Geometry.of(data_samples, images.device)
        # in training weights and images change, and with gradients maps belong to a graph
        known = () if self.training or torch.is_grad_enabled() else data_samples
        cells = self._look(geometry, images.shape[-2:])
        history = self._history(images, geometry, cells, known)
        if self.training and self.grid_mask is not None:
            maps = self.extract_feat(self.grid_mask(images[:, self.current]), geometry.flip)
        else:
            maps = self._maps(images, geometry, self.current, known)
        bev = self._encode(maps, geometry, self.current, images.shape[-2:], cells[self.current])
        return self._fuse(bev, history, geometry), maps, geometry

    def _extra_queries(self, maps: Sequence[Tensor],
                       geometry: Geometry) -> Optional[ExtraQueries]:
        """Queries for single samples from the maps of the current frame; none in one stage."""
        return None

    def loss(self, batch_inputs_dict: dict, batch_data_samples: Sequence[Any],
             **kwargs: Any) -> dict[str, Tensor]:
        """Losses of the BEV head, and with the prefix `mono_` of the perspective head.

        Args:
            batch_inputs_dict: `imgs`, shape (B, T * V, 3, H, W).
            batch_data_samples: of `PackBEVInputs`.
            kwargs: unused, of the base class.
        """
        bev, maps, geometry = self._bev(batch_inputs_dict, batch_data_samples)
        losses = dict(self.bev_head.loss(bev, batch_data_samples,
                                         self._extra_queries(maps, geometry)))
        if self.perspective_head is not None:
            mono = self.perspective_head.loss(maps, batch_data_samples, geometry.cam2img)
            losses.update({f'mono_{name}': self.mono_loss_weight * value
                           for name, value in mono.items()})
        return losses

    def predict(self, batch_inputs_dict: dict, batch_data_samples: Sequence[Any],
                **kwargs: Any) -> Sequence[Any]:
        """The samples with `pred_instances_3d`; arguments as in :meth:`loss`."""
        bev, maps, geometry = self._bev(batch_inputs_dict, batch_data_samples)
        results = self.bev_head.predict(bev, self._extra_queries(maps, geometry))
        return self.add_pred_to_datasample(batch_data_samples, results)

    def _forward(self, batch_inputs_dict: dict, batch_data_samples: Sequence[Any],
                 **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raw outputs of the BEV head: logits and codes of all decoder layers."""
        bev, maps, geometry = self._bev(batch_inputs_dict, batch_data_samples)
        return self.bev_head(bev, self._extra_queries(maps, geometry))
