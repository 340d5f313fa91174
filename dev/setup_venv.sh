#!/usr/bin/env bash
# setup_venv.sh PYTHON VENV — creates the tested environment of requirements/ in VENV.
#
# mmcv compiles its operators against the torch that is already installed, so the order matters:
# torch, then mmcv without build isolation, then everything else.
set -euo pipefail
python=$1
venv=$2

if [ -z "$python" ]; then
  echo 'mmdcnv4: no python3 was found; install Python 3.11 or pass PYTHON=/path/to/python' >&2
  exit 1
fi
case $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') in
  3.9 | 3.10 | 3.11 | 3.12 | 3.13) ;;
  *)
    echo "mmdcnv4: Python 3.9 to 3.13 is needed, $python is $("$python" --version 2>&1)" >&2
    exit 1
    ;;
esac
if ! "$python" -m venv --help >/dev/null 2>&1; then
  echo "mmdcnv4: $python has no venv module; on Debian: apt-get install python3-venv" >&2
  exit 1
fi

step() { echo "[set-up, $((SECONDS / 60)) min $((SECONDS % 60)) s] $*"; }

step "virtual environment in $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/pip install --quiet --disable-pip-version-check"
# for every call, and for what pip builds in between
PIP_CONSTRAINT=$(pwd)/requirements/constraints.txt
export PIP_CONSTRAINT

step 'build tools and torch'
$pip --upgrade pip
$pip -r requirements/build.txt
$pip -r requirements/torch.txt
step 'mmengine and mmcv (mmcv compiles for about 12 minutes unless a wheel is found)'
$pip mmengine
MMCV_WITH_OPS=1 FORCE_CUDA=${FORCE_CUDA:-0} MAX_JOBS=${MAX_JOBS:-$(nproc)} \
  $pip --no-build-isolation mmcv
step 'mmdet, mmsegmentation, mmpretrain, mmdet3d and the test tools'
$pip -r requirements/mm.txt
$pip --no-deps mmdet3d # its open3d dependency is for windows on a screen only
$pip -r requirements/dev.txt
if ! "$venv/bin/python" -c 'import cv2' 2>/dev/null; then
  step 'OpenCV without a screen (libGL is missing here)'
  "$venv/bin/pip" uninstall --quiet --yes opencv-python opencv-python-headless
  $pip opencv-python-headless
  "$venv/bin/python" -c 'import cv2'
fi
# The torchvision of the package index is compiled for a CUDA build of torch: next to a CPU build its
# import fails, and with it those of mmpretrain and of MMEngine's Runner. The last one that can be
# imported without its operators, which nothing here uses, serves instead.
if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
  step 'torchvision without its operators (torch is a CPU build)'
  PIP_CONSTRAINT='' $pip --no-deps torchvision==0.15.2 || {
    echo 'mmdcnv4: no torchvision fits this torch: mmpretrain is left out, classifiers are not tested' >&2
    "$venv/bin/pip" uninstall --quiet --yes torchvision mmpretrain
  }
fi
step 'done'
