_base_ = '../_base_/methods/image-classifier_convnext_300e_in1k.py'

model = dict(
    backbone=dict(arch='b', drop_path_rate=0.5),
    head=dict(in_channels=1024))
