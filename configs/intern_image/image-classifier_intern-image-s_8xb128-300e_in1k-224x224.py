_base_ = '../_base_/methods/image-classifier_300e_in1k-224x224.py'

model = dict(
    backbone=dict(type='InternImage', arch='s', drop_path_rate=0.4),
    neck=dict(in_channels=640, out_channels=960),
    head=dict(in_channels=960))
