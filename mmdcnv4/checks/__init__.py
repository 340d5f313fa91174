# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What can be found wrong before a run, or in the one sample that fails.

Only what the run itself reads from the local disk is looked at, so that nothing is refused that
the host libraries accept. A check raises a :class:`mmdcnv4.errors.UserError`. The tools run the
checks before a run; :class:`mmdcnv4.engine.hooks.RunChecksHook` brings them to other trainers.
"""
