_base_ = '../_base_/methods/image-classifier_dat_300e_in1k.py'

model = dict(
    backbone=dict(arch='dat_pp_tiny', drop_path_rate=0.2),
    head=dict(in_channels=512))
