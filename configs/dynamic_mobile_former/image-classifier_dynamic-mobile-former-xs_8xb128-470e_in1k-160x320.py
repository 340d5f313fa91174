_base_ = '../_base_/methods/image-classifier_dynamic-mobile-former_470e_in1k.py'

model = dict(
    backbone=dict(arch='xs'),
    head=dict(in_channels=1152 + 192, mid_channels=[1920], dropout_rate=0.3))  # dropout as S
