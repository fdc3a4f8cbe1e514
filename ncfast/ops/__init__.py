"""The operations that carry everything, one room each.

| room            | what it does                                                                  |
| --------------- | ----------------------------------------------------------------------------- |
| `class_scatter` | one pass over the features: counts, shifted sums, sums of squares and scatter  |
| `affine_argmax` | every decision rule: the classifier's and the nearest-class-centre one         |
| `pair_geometry` | all pairs of classes: angles, distances, decision radii                        |
| `certify`       | the samples that a decision radius decides, and the rows of the others         |

A room holds `__init__.py` (the contract and the argument checks), `reference.py` (float64 PyTorch, straight
from the formula) and one module per fast backend with the same signature. `dispatch.py` alone knows which one
runs.
"""

import contextlib

with contextlib.suppress(ImportError):  # what is not there, or broken, is complained about where it is needed
    import ncfast._cpu  # noqa: F401 (what is forked before its first kernel has to know: csrc/cpu/pool.cpp)
