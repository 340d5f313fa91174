_base_ = '../_base_/methods/image-classifier_300e_in1k-224x224.py'

model = dict(
    backbone=dict(type='InternImage', arch='t', drop_path_rate=0.1),
    neck=dict(in_channels=512, out_channels=768),
    head=dict(in_channels=768))
