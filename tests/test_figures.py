"""Colours that every reader can tell apart."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from condexp.records import METHOD_COLOURS

SEEN = {  # linear RGB as it is seen, Machado, Oliveira & Fernandes 2009 (severity 1)
    "by most": np.eye(3),
    "with protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "with deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}
TO_XYZ = np.array([[0.412, 0.358, 0.180], [0.213, 0.715, 0.072], [0.019, 0.119, 0.950]])  # of linear sRGB, D65


def lab(colour, seen):
    "CIELAB of a colour as somebody sees it."
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(np.array(seen) @ linear, 0, 1) / TO_XYZ.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_any_two_methods_have_colours_that_are_far_apart(seen):
    colours = [lab(colour, seen) for colour in METHOD_COLOURS.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 20  # 2 can just be told apart
