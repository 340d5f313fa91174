_base_ = '../_base_/methods/image-classifier_vit_300e_in1k.py'

model = dict(backbone=dict(arch='s'), head=dict(in_channels=384))
