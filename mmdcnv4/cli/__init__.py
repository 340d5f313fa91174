# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the programs in `tools/` share; every program imports what it needs from here.

MMEngine 0.10.7 does most of it. Added here, for all task libraries: checkpoints of MMEngine load
with torch >= 2.6 (`checkpoints`), distributed runs need no GPU (`distributed`), `--resume` goes to
the newest checkpoint that is whole, and faults in the user's files are found before the run
(`preflight`) or end it in one clear line (`explain`).
"""

import warnings

# of setuptools, to each library that imports it; nothing a user could do about it
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
