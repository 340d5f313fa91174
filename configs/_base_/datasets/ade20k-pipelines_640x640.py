# Pipelines for ADE20K with crops of 640 x 640: training as in mmseg's UperNet recipes, and testing
# on whole images, as they are or with sides that are stretched to multiples of 32. Padding to such
# a size, as `test_cfg=dict(size_divisor=32)` of the data preprocessor does, is another evaluation.
ade_scale = (2560, 640)
ade_multiple = dict(type='ResizeToMultiple', size_divisor=32)
ade_load_labels = dict(type='LoadAnnotations', reduce_zero_label=True)
ade_train = [
    dict(type='LoadImageFromFile'),
    ade_load_labels,
    dict(type='RandomResize', scale=ade_scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(640, 640), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
ade_test = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=ade_scale, keep_ratio=True),
    ade_load_labels,  # after the resize: labels keep the size of the file
    dict(type='PackSegInputs'),
]
ade_test_multiple = [*ade_test[:2], ade_multiple, *ade_test[2:]]
# The multi-scale test: ratios of the test scale (mmseg's own are ratios of the image file), each
# also flipped.
ade_ratios = [0.75, 1.0, 1.25]
ade_scales = [
    dict(type='Resize', scale=(int(ade_scale[0] * ratio), int(ade_scale[1] * ratio)),
         keep_ratio=True)
    for ratio in ade_ratios
]
ade_flips = [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)]
ade_tta = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[ade_scales, ade_flips, [ade_load_labels], [dict(type='PackSegInputs')]]),
]
ade_tta_multiple = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[ade_scales, [ade_multiple], ade_flips, [ade_load_labels],
                    [dict(type='PackSegInputs')]]),
]
