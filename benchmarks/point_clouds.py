"""Denoising of point clouds, beside the peers that install here, and the published figures.

Shapes of `../shared/data/shapes`, sampled at even distances (as PU-Net's) and independently, with Gaussian noise of 1, 2
and 3 % of the bounding sphere's radius. Chamfer distance and mean squared distance to the surface, times 10⁴, in units of
that radius (Luo & Hu, ICCV 2021); the latter also with the way back, from each triangle to its nearest point, as the
published figures have it. The scalars of ours are learned on surfaces made from formulas, from their true surfaces and
from the noisy points only. Settings of peers are the best on two of the meshes, which are not reported.

    OMP_NUM_THREADS=1 python benchmarks/point_clouds.py --json point_clouds.json
"""

import itertools
import logging
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import PROJECT, arguments, quiet_trainer, write_json
from _peers import failure
from scipy.spatial import KDTree
from torch_geometric.data import Data

from callbacks import EMParameterCallback, NewtonRule
from datamodules import PointCloudDataModule
from datamodules._surface_samples import sample_surface
from lightning_modules import PointCloudDiffusion, PointCloudReconstruction
from lightning_modules.point_clouds import chamfer_distance
from lightning_modules.point_clouds.files import read_cloud

# Two meshes on which peers' settings, and nothing of ours, are chosen; the others are reported.
CHOSEN_ON = ("cow", "spot")
LEVELS = (0.01, 0.02, 0.03)
