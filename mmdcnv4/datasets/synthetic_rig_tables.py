# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The tables of the nuScenes devkit for the synthetic rig: key frames of cameras and LiDAR.

The first two scenes carry names of the devkit's splits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

SCENES = {  # version -> names: both in mini_val; one in train, one in val; both in test
    'v1.0-mini': ('scene-0103', 'scene-0916'), 'v1.0-trainval': ('scene-0001', 'scene-0003'),
    'v1.0-test': ('scene-0077', 'scene-0078')}
CATEGORIES = dict(
    car='vehicle.car', truck='vehicle.truck', trailer='vehicle.trailer', bus='vehicle.bus.rigid',
    construction_vehicle='vehicle.construction', bicycle='vehicle.bicycle',
    motorcycle='vehicle.motorcycle', pedestrian='human.pedestrian.adult',
    traffic_cone='movable_object.trafficcone', barrier='movable_object.barrier')
ATTRIBUTES = ('cycle.with_rider', 'cycle.without_rider', 'pedestrian.moving',
              'pedestrian.standing', 'pedestrian.sitting_lying_down', 'vehicle.moving',
              'vehicle.parked', 'vehicle.stopped')


def _turn(yaw: float) -> list[float]:
    """Quaternion of a turn about z."""
    return [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]


def _calibration(matrix: Sequence[Sequence[float]]) -> dict:
    """Translation and unit quaternion (w, x, y, z) of a 4x4 matrix."""
    pose = np.asarray(matrix, dtype=np.float64)
    m = pose[:3, :3]
    # eigenvector of the largest eigenvalue: Bar-Itzhack, J. Guidance 23(6), 2000
    k = np.zeros((4, 4))
    k[0, 0], k[1:, 1:] = np.trace(m), m + m.T - np.trace(m) * np.eye(3)
    k[0, 1:] = k[1:, 0] = [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]]
    return dict(translation=pose[:3, 3].tolist(), rotation=np.linalg.eigh(k)[1][:, -1].tolist())


def _sensors(info: dict) -> list[dict]:
    """Rows of `sensor` and `calibrated_sensor` in one, of the rig that took a sample."""
    rows = [dict(token='lidar', channel='LIDAR_TOP', modality='lidar', camera_intrinsic=[],
                 **_calibration(info['lidar_points']['lidar2ego']))]
    return rows + [dict(token=camera, channel=camera, modality='camera',
                        camera_intrinsic=image['cam2img'], **_calibration(image['cam2ego']))
                   for camera, image in info['images'].items()]


def _sample_data(samples: Sequence[dict], data_list: Sequence[dict]) -> list[dict]:
    """Rows of `sample_data`: the sweep and the images of each key frame."""
    rows = []
    for sample, info in zip(samples, data_list):
        files = {'lidar': f'samples/LIDAR_TOP/{info["lidar_points"]["lidar_path"]}'}
        files.update({camera: f'samples/{camera}/{image["img_path"]}'
                      for camera, image in info['images'].items()})
        rows += [dict(token=f'{sample["token"]}-{sensor}', sample_token=sample['token'],
                      ego_pose_token=sample['token'], calibrated_sensor_token=sensor,
                      timestamp=sample['timestamp'], fileformat=name.rsplit('.', 1)[1],
                      is_key_frame=True, height=0, width=0, filename=name, prev='', next='')
                 for sensor, name in files.items()]
    return rows


def _annotations(data_list: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Rows of `sample_annotation` and `instance`; object k of a scene is one instance."""
    annotations: dict[tuple[str, int], list[dict]] = {}
    for info in data_list:
        scene = info['token'].split('-')[1]
        for number, item in enumerate(info['instances']):
            length, width, height = item['bbox_3d'][3:6]
            known = item['attribute'] < len(ATTRIBUTES)
            annotations.setdefault((scene, number), []).append(dict(
                token=f'{info["token"]}-{number}', sample_token=info['token'],
                instance_token=f'{scene}-{number}', visibility_token='4',
                attribute_tokens=[ATTRIBUTES[item['attribute']]] if known else [],
                translation=item['center'], size=[width, length, height],
                rotation=_turn(item['yaw']), num_lidar_pts=item['num_lidar_pts'],
                num_radar_pts=item['num_radar_pts'], category=item['name']))
    rows, instances = [], []
    for (scene, number), chain in annotations.items():
        tokens = ['', *(row['token'] for row in chain), '']
        for place, row in enumerate(chain):
            row.update(prev=tokens[place], next=tokens[place + 2])
        instances.append(dict(
            token=f'{scene}-{number}', category_token=chain[0].pop('category'),
            nbr_annotations=len(chain), first_annotation_token=tokens[1],
            last_annotation_token=tokens[-2]))
        for row in chain[1:]:
            row.pop('category')
        rows += chain
    return rows, instances


def write_tables(root: Path, data_list: Sequence[dict], links: Sequence[dict],
                 classes: Sequence[str], version: str = 'v1.0-mini') -> None:
    """Writes `<root>/<version>/*.json` and a blank map.

    Args:
        root: of the dataset.
        data_list: of the info file, with the world-frame `center`, `yaw`, `attribute` and `name`
            of each instance; these four are taken out.
        links: rows of `sample`: `token`, `scene_token`, `prev`, `next`.
        classes: names of the classes; those of nuScenes get its categories.
        version: one of `SCENES`; 'v1.0-test' has no annotations.
    """
    annotations, instances = _annotations(data_list)
    if version == 'v1.0-test':
        annotations, instances = [], []
    for info in data_list:
        for item in info['instances']:
            for key in ('center', 'yaw', 'attribute', 'name'):
                del item[key]
    samples = [dict(link, timestamp=round(info['timestamp'] * 1e6))
               for link, info in zip(links, data_list)]
    scenes: dict[str, list[dict]] = {}
    for sample in samples:
        scenes.setdefault(sample['scene_token'], []).append(sample['token'])
    names = [*SCENES[version], *(f'scene-{9000 + index}' for index in range(2, len(scenes)))]
    poses = [np.array(info['ego2global']) for info in data_list]
    tables = dict(
        category=[dict(token=name, name=CATEGORIES.get(name, name), description='')
                  for name in classes],
        attribute=[dict(token=name, name=name, description='') for name in ATTRIBUTES],
        visibility=[dict(token='4', level='v80-100', description='')],
        sensor=[{key: row[key] for key in ('token', 'channel', 'modality')}
                for row in _sensors(data_list[0])],
        calibrated_sensor=[dict(row, sensor_token=row['token'])
                           for row in _sensors(data_list[0])],
        ego_pose=[dict(token=info['token'], timestamp=sample['timestamp'],
                       translation=pose[:3, 3].tolist(),
                       rotation=_turn(math.atan2(pose[1, 0], pose[0, 0])))
                  for info, sample, pose in zip(data_list, samples, poses)],
        log=[dict(token='log', logfile='', vehicle='', date_captured='', location='boston')],
        scene=[dict(token=token, name=name, log_token='log', description='',
                    nbr_samples=len(tokens), first_sample_token=tokens[0],
                    last_sample_token=tokens[-1])
               for name, (token, tokens) in zip(names, scenes.items())],
        sample=samples,
        sample_data=_sample_data(samples, data_list),
        sample_annotation=annotations, instance=instances,
        map=[dict(token='map', log_tokens=['log'], category='semantic_prior',
                  filename='maps/blank.png')])
    for folder in (version, 'maps'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(root / 'maps' / 'blank.png'), np.zeros((4, 4), np.uint8))
    for name, rows in tables.items():
        (root / version / f'{name}.json').write_text(json.dumps(rows))
