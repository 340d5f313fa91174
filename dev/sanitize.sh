#!/usr/bin/env bash
# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
#
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests marked
# `hostile` on them, with the kernels of every instruction set of this machine.
#
#   dev/sanitize.sh [python [pytest arguments]]
#
# The build lies in .build/sanitize, beside links to the Python files of the package, so that the
# ordinary build is neither used nor touched. Needs GCC; compiling takes a few minutes.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=$(realpath -s "$(command -v "${1:-python}")")
shift || true
build=$root/.build/sanitize

mkdir -p "$build"
echo 'Compiling with the sanitizers'
MMDCNV4_SANITIZE=1 MMDCNV4_CUDA=0 "$python" setup.py -q build_ext \
  --build-lib "$build" --build-temp "$build-objects" > "$build.log" 2>&1 || {
  tail -n 40 "$build.log" >&2
  exit 1
}
for entry in mmdcnv4/*; do  # links, so that tracebacks name the real files
  [[ $entry == *.so || $entry == */__pycache__ ]] || ln -sfn "$root/$entry" "$build/$entry"
done

# The interpreter is not sanitized, so the run-time libraries have to be loaded first; libstdc++ as
# well, for AddressSanitizer to find the real function that throws exceptions.
preload=''
for library in libasan.so libubsan.so libstdc++.so; do
  path=$("${CXX:-c++}" -print-file-name="$library")
  if [[ $path != /* ]]; then
    echo "dev/sanitize.sh: ${CXX:-c++} has no $library; install the sanitizers of GCC" >&2
    exit 1
  fi
  preload="$preload $(readlink -f "$path")"
done
export PYTHONPATH=$build PYTHONDONTWRITEBYTECODE=1
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
sanitized() {
  (cd "$build" && LD_PRELOAD=${preload# } "$python" "$@")  # in the root, the ordinary build is first
}

echo 'Is the sanitized library the one that is loaded?'
sanitized - "$build" <<'CODE'
import ctypes, pathlib, sys
import torch, mmdcnv4._C
library = pathlib.Path(mmdcnv4._C.__file__)
assert library.is_relative_to(sys.argv[1]), f'{library} is not the sanitized build'
content = library.read_bytes()
for symbol in (b'__asan_report_load', b'__ubsan_handle_float_cast_overflow',
               b'__ubsan_handle_mul_overflow'):
    assert symbol in content, f'{library} was compiled without {symbol.decode()}'
ctypes.CDLL(None).__asan_init, ctypes.CDLL(None).__ubsan_handle_out_of_bounds
print(f'yes: {library}')
CODE

echo 'Is a read beyond the end of a tensor reported?'
if sanitized - > "$build.log" 2>&1 <<'CODE'
import torch
from mmdcnv4.ops import dcnv4
value, offset_mask = torch.randn(1, 8, 9, 16), torch.zeros(1, 8, 9, 32)
value.untyped_storage().resize_(value.nbytes // 2)
dcnv4(value, offset_mask, kernel_size=3, groups=1, padding=1)
CODE
then
  echo 'dev/sanitize.sh: no, so a pass of the tests would mean nothing' >&2
  exit 1
elif ! grep -q 'heap-buffer-overflow' "$build.log" || ! grep -q 'csrc/cpu/' "$build.log"; then
  tail -n 40 "$build.log" >&2
  exit 1
fi
grep -m 1 'heap-buffer-overflow' "$build.log" | sed 's/^/yes: /'

echo 'Hostile inputs'  # not captured: a report that ends the process would be lost
sanitized -m pytest -p no:cacheprovider --capture=sys -q -c "$root/pyproject.toml" --rootdir "$root" \
  -m hostile "$root/tests/ops" "$@"
