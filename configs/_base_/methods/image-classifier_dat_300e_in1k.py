# DAT and DAT++ on ImageNet-1K from scratch. The published runs used mixed precision (--amp).
_base_ = './image-classifier_300e_in1k.py'

model = dict(
    backbone=dict(type='DAT', out_indices=(3, )),
    neck=dict(type='GlobalAveragePooling'))

# no decay of the tables of deformable attention, either; those of neighbourhood attention decay
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.rpe_table': dict(decay_mult=0.0)}))
