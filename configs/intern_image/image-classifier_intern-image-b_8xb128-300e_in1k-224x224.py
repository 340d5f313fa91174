_base_ = '../_base_/methods/image-classifier_300e_in1k-224x224.py'

model = dict(
    backbone=dict(type='InternImage', arch='b', drop_path_rate=0.5),
    neck=dict(in_channels=896, out_channels=1344),
    head=dict(in_channels=1344))
