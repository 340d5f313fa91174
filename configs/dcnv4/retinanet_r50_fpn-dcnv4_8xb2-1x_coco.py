# DCNv4 in place of the 3x3 convolutions of the neck. `conv_cfg` would replace the 1x1 ones, too.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../_base_/plugin.py']

model = dict(
    neck=dict(
        _delete_=True,  # the plain FPN, which is inside now
        type='with_dcnv4',
        module=_base_.model.neck,
        replace=dict(
            match='fpn_convs.*.conv',
            targets=('conv3x3', ),
            cfg=dict(value_width='out'))))  # the fourth one narrows from 2048 channels to 256
