# Drawn shapes as label maps. python tools/dataset_converters/drawn_scenes.py data/drawn_scenes
data_root = 'data/drawn_scenes/ade/'
scenes = dict(
    type='BaseSegDataset',
    data_root=data_root,
    # 0 in a label map, the background, is a class of its own here; ADE20K's recipes ignore it
    # (reduce_zero_label=True).
    metainfo=dict(
        classes=('background', 'disk', 'ring', 'square', 'triangle', 'star'),
        palette=[(90, 90, 90), (230, 70, 60), (70, 130, 240), (60, 180, 90), (240, 180, 40),
                 (170, 90, 220)]))
test_pipeline = [  # under this name for mmseg's inference_model
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **scenes,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='RandomFlip', prob=[0.25, 0.25, 0.25],
                 direction=['horizontal', 'vertical', 'diagonal']),
            dict(type='PackSegInputs'),
        ]))
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **scenes,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
