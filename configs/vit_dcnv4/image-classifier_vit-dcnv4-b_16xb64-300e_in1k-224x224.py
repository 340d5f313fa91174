_base_ = '../_base_/methods/image-classifier_vit_300e_in1k.py'

model = dict(backbone=dict(arch='b', drop_path_rate=0.1), head=dict(in_channels=768))

# A decay of 0.99996; the averaged weights are evaluated and saved.
custom_hooks = [dict(type='EMAHook', momentum=4e-5, priority='ABOVE_NORMAL')]
