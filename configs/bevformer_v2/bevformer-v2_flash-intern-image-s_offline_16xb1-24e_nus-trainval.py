# Trains on both splits with annotations, and writes the file for the test server. Nothing is
# evaluated in between: no split is left for it.
_base_ = './bevformer-v2_flash-intern-image-s_offline_16xb1-24e_nus.py'

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            _base_.train_dataloader.dataset,
            {**_base_.train_dataloader.dataset, 'ann_file': 'nuscenes_infos_val.pkl'}
        ]))
val_dataloader = None
val_evaluator = None
val_cfg = None
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=24)

test_dataloader = dict(
    dataset=dict(
        ann_file='nuscenes_infos_test.pkl',
        metainfo=dict(version='v1.0-test'),
        load_eval_anns=False))  # the test split has none
test_evaluator = dict(
    ann_file=_base_.data_root + 'nuscenes_infos_test.pkl',
    format_only=True,
    jsonfile_prefix='work_dirs/nuscenes-test')
