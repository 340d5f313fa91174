# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Info files of nuScenes for BEVFormer v2, with the converter of mmdetection3d.

python tools/dataset_converters/nuscenes.py data/nuscenes

writes `nuscenes_infos_train.pkl` and `nuscenes_infos_val.pkl` (`_test.pkl` for v1.0-test), version
1.1, with the links between samples and without LiDAR sweeps, which no camera model reads. It can
be started in any folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VERSIONS = ('v1.0-trainval', 'v1.0-mini', 'v1.0-test')
TABLES = ('scene', 'sample', 'sample_data', 'ego_pose', 'calibrated_sensor')
LINKS = ('scene_token', 'prev', 'next')


def converters() -> tuple[Any, Any]:
    """The two modules of mmdet3d; its folder of tools is data of the package, and no package."""
    # this file is called like the devkit, and would be found instead of it
    sys.path[:] = [path for path in sys.path if Path(path or os.getcwd()).resolve() != HERE]
    import mmdet3d
    folder = Path(mmdet3d.__file__).parent
    for tools in (folder / '.mim' / 'tools', folder.parent / 'tools'):
        if (tools / 'dataset_converters' / 'nuscenes_converter.py').is_file():
            sys.path.append(str(tools / 'dataset_converters'))
            return (importlib.import_module('nuscenes_converter'),
                    importlib.import_module('update_infos_to_v2'))
    raise FileNotFoundError(f'no dataset_converters/nuscenes_converter.py in {folder}/.mim/tools; '
                            'is mmdet3d 1.x installed whole?')


def add_links(path: Path, samples: dict[str, dict]) -> int:
    """Puts the links of the sample table into an info file; returns the number of its samples."""
    import mmengine

    from mmdcnv4.safe_files import load_infos
    infos = load_infos(str(path))
    for info in infos['data_list']:
        info.update({key: samples[info['token']][key] for key in LINKS})
    mmengine.dump(infos, path)
    return len(infos['data_list'])


def convert(root: Path, version: str, out: Path) -> list[Path]:
    """Writes the info files; returns their paths.

    Raises:
        FileNotFoundError: a table is missing.
    """
    for table in TABLES:
        if not (root / version / f'{table}.json').is_file():
            raise FileNotFoundError(f'root must be the folder of nuScenes with {version}, got '
                                    f'{root} without {version}/{table}.json')
    creator, updater = converters()
    out.mkdir(parents=True, exist_ok=True)
    prefix = str(out / 'nuscenes')
    creator.create_nuscenes_infos(str(root), prefix, version=version, max_sweeps=0)
    devkit = updater.NuScenes
    # the second step looks in ./data/nuscenes whatever the root is
    updater.NuScenes = lambda version, dataroot, verbose: devkit(version, str(root), verbose)
    table = json.loads((root / version / 'sample.json').read_text())
    samples = {row['token']: row for row in table}
    paths = []
    for split in ('test',) if version == 'v1.0-test' else ('train', 'val'):
        paths.append(Path(f'{prefix}_infos_{split}.pkl'))
        updater.update_pkl_infos('nuscenes', out_dir=str(out), pkl_path=str(paths[-1]))
        print(f'{paths[-1]}: {add_links(paths[-1], samples)} samples')
    return paths


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Write the info files of nuScenes.')
    parser.add_argument('root', type=Path, help='folder of nuScenes, usually data/nuscenes')
    parser.add_argument('--version', choices=VERSIONS, default=VERSIONS[0])
    parser.add_argument('--out', type=Path, help='folder to write to; the root by default')
    return parser.parse_args()


def main() -> None:
    """Converts."""
    args = parse_args()
    root = args.root.resolve()
    convert(root, args.version, (args.out or root).resolve())


if __name__ == '__main__':
    main()
