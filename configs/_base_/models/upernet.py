# mmseg's UperNet for the 150 classes of ADE20K; backbone, widths and crop size come from the leaf.
_base_ = 'mmseg::_base_/models/upernet_swin.py'

model = dict(decode_head=dict(num_classes=150), auxiliary_head=dict(num_classes=150))
