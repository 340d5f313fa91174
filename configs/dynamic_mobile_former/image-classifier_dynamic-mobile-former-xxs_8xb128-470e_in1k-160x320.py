_base_ = '../_base_/methods/image-classifier_dynamic-mobile-former_470e_in1k.py'

model = dict(
    backbone=dict(arch='xxs'),
    head=dict(in_channels=960 + 192, mid_channels=[1600], dropout_rate=0.2))
