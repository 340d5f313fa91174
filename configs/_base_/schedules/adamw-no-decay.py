# Which parameters have no weight decay in the recipes of DAT++: norms, tables of position biases.
# The tables of neighbourhood attention (`rpb`) do decay, as in the published code.
no_decay = dict(
    norm_decay_mult=0.0,
    custom_keys=dict(
        absolute_pos_embed=dict(decay_mult=0.0),
        relative_position_bias_table=dict(decay_mult=0.0),
        rpe_table=dict(decay_mult=0.0),
        norm=dict(decay_mult=0.0)))
