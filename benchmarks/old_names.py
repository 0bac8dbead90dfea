"""Modules that have left torchvision and SciPy since the clones were written: importing this brings them back."""

import sys

import scipy.ndimage
import torch.hub

sys.modules.setdefault("scipy.ndimage.interpolation", scipy.ndimage)
sys.modules.setdefault("torchvision.models.utils", torch.hub)
