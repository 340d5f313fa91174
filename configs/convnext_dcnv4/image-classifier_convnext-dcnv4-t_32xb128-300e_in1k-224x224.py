_base_ = '../_base_/methods/image-classifier_convnext_300e_in1k.py'

model = dict(
    backbone=dict(arch='t', drop_path_rate=0.1),
    head=dict(in_channels=768))
