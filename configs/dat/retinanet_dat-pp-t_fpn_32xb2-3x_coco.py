_base_ = [
    '../_base_/methods/retinanet_dat-pp_coco.py',
    '../_base_/schedules/adamw-no-decay_3x.py', '../_base_/models/dat-pp_t.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.dat,
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        with_cp=True),
    neck=dict(in_channels=_base_.widths[1:]))

optim_wrapper = dict(optimizer=dict(lr=2e-4))
