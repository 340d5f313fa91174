# Drawn scenes with boxes, in the pure-Python style: classes instead of names.
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.evaluation import CocoMetric
from mmengine.dataset import DefaultSampler

data_root = 'data/drawn_scenes/coco/'
pipeline = [dict(type=LoadImageFromFile), dict(type=LoadAnnotations, with_bbox=True),
            dict(type=Resize, scale=(64, 64), keep_ratio=True),
            dict(type=PackDetInputs, meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                                'scale_factor'))]
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CocoDataset, data_root=data_root,
        metainfo=dict(classes=('disk', 'ring', 'square', 'triangle', 'star'),
                      palette=[(230, 70, 60), (70, 130, 240), (60, 180, 90), (240, 180, 40),
                               (170, 90, 220)]),
        ann_file='annotations/instances_train.json', data_prefix=dict(img='images/train/'),
        pipeline=pipeline))
test_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CocoDataset, data_root=data_root, test_mode=True,
        metainfo=train_dataloader['dataset']['metainfo'],
        ann_file='annotations/instances_val.json', data_prefix=dict(img='images/val/'),
        pipeline=pipeline))
val_dataloader = test_dataloader
test_evaluator = dict(type=CocoMetric, metric='bbox',
                      ann_file=data_root + 'annotations/instances_val.json')
val_evaluator = test_evaluator
