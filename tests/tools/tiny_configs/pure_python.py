# A tiny RetinaNet in the pure-Python style: no default_scope, classes instead of names.
from mmengine.config import read_base

with read_base():
    from .pure_python_data import *  # noqa: F403

from mmcv.ops import nms
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.models import FPN, DetDataPreprocessor, FocalLoss, L1Loss, RetinaHead, RetinaNet
from mmdet.models.task_modules import (
    AnchorGenerator,
    BboxOverlaps2D,
    DeltaXYWHBBoxCoder,
    MaxIoUAssigner,
    PseudoSampler,
)
from mmdet.visualization import DetLocalVisualizer
from mmengine.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend
from torch.nn import BatchNorm2d
from torch.optim import AdamW

from mmdcnv4.models.backbones import FlashInternImage

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, mean=[0, 0, 0], std=[255, 255, 255],
                           pad_size_divisor=32),
    backbone=dict(type=FlashInternImage, channels=8, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8)),
    neck=dict(type=FPN, in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4,
              norm_cfg=dict(type=BatchNorm2d)),
    bbox_head=dict(
        type=RetinaHead, num_classes=5, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(type=AnchorGenerator, scales=[5], ratios=[1.0],
                              strides=[4, 8, 16, 32]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss, use_sigmoid=True), loss_bbox=dict(type=L1Loss)),
    train_cfg=dict(assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4,
                                 ignore_iof_thr=-1, iou_calculator=dict(type=BboxOverlaps2D)),
                   sampler=dict(type=PseudoSampler), allowed_border=-1, pos_weight=-1),
    test_cfg=dict(nms_pre=20, min_bbox_size=0, score_thr=0.0, nms=dict(type=nms, iou_threshold=0.5),
                  max_per_img=5))

train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1, val_interval=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-3))
default_hooks = dict(
    timer=dict(type=IterTimerHook), logger=dict(type=LoggerHook, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook), checkpoint=dict(type=CheckpointHook),
    sampler_seed=dict(type=DistSamplerSeedHook), visualization=dict(type=DetVisualizationHook))
visualizer = dict(type=DetLocalVisualizer, vis_backends=[dict(type=LocalVisBackend)])
env_cfg = dict(dist_cfg=dict(backend='gloo'))
