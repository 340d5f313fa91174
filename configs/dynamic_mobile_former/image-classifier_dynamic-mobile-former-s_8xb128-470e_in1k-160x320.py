_base_ = '../_base_/methods/image-classifier_dynamic-mobile-former_470e_in1k.py'

model = dict(
    backbone=dict(arch='s'),
    head=dict(in_channels=1440 + 192, mid_channels=[1920], dropout_rate=0.3))
