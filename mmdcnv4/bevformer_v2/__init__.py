# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""BEVFormer v2 for mmdetection3d 1.x; needs mmdet3d, and is not imported by `mmdcnv4` alone.

Make it known to a config with
`custom_imports = dict(imports=['mmdcnv4', 'mmdcnv4.bevformer_v2'], allow_failed_imports=False)`.
"""

from .data.center_distance_metric import CenterDistanceMetric
from .data.nuscenes_metric import NuScenesSplitMetric
from .data.nuscenes_temporal import NuScenesTemporalDataset
from .data.transforms import (
    BEVAugment,
    ClipToUint8,
    LoadTemporalMultiViewImages,
    MultiViewCropResize,
    PackBEVInputs,
)
from .inferencer import BEVInferencer, Calibration
from .models.bev_encoder import BEVFormerV2Encoder, TemporalFusion
from .models.bev_head import BEVFormerV2Head
from .models.box_code import BBox3DCodeSmoothL1Cost
from .models.detector import BEVFormerV2
from .models.perspective_head import PerspectiveHead
from .models.two_stage import ProposalQueries, TwoStageBEVFormerV2
from .targets.mono_targets import MonoTargets

__all__ = [
    'BBox3DCodeSmoothL1Cost', 'BEVAugment', 'BEVFormerV2', 'BEVFormerV2Encoder',
    'BEVFormerV2Head', 'BEVInferencer', 'Calibration', 'CenterDistanceMetric', 'ClipToUint8',
    'LoadTemporalMultiViewImages', 'MonoTargets', 'MultiViewCropResize', 'NuScenesSplitMetric',
    'NuScenesTemporalDataset', 'PackBEVInputs', 'PerspectiveHead', 'ProposalQueries',
    'TemporalFusion', 'TwoStageBEVFormerV2'
]
