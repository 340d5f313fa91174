# Table 1 of the DCNv4 paper: a softmax over the 49 weights of every depthwise convolution.
_base_ = './image-classifier_convnext-dcnv4-b_32xb128-300e_in1k-224x224.py'

model = dict(backbone=dict(core_op='SoftmaxDWConv'))
