"""ncfast: neural-collapse metrics in one pass over the features.

The map of the house, from the outside in:

| module        | what is there                                                                            |
| ------------- | ---------------------------------------------------------------------------------------- |
| `tracker`     | `Tracker`: epoch by epoch inside a training loop                                           |
| `history`     | the records of a run, and their .csv and .json files                                       |
| `integrations`| for torchmetrics and Lightning; never imported by ncfast itself                            |
| `measure`     | `measure` (features and labels), `measure_model` (a model and its loaders)                 |
| `collapse`    | `collapse`: NC1–NC4 and their kin from a `ClassStatistics`; `CollapseReport`               |
| `statistics`  | `ClassStatistics`: the streaming, mergeable state                                          |
| `ops`         | the three operations, one room each, and `dispatch`, which picks their backend             |
| `reference`   | the slow, obvious twin of every operation                                                  |
| `theory`      | what the paper's theorems predict: simplex ETF, Webb–Lowe classifier, error exponent       |
| `plotting`    | the paper's Figs. 2–7 over epochs (needs matplotlib)                                       |
| `cli`, `demo` | `python -m ncfast`                                                                         |

Dependencies point one way: cli, tracker, integrations → measure → collapse → statistics → ops.
"""

from ncfast import reference
from ncfast.collapse import CollapseReport, collapse
from ncfast.measure import measure, measure_model
from ncfast.ops.affine_argmax import affine_argmax, nearest_class_center
from ncfast.ops.class_scatter import class_scatter
from ncfast.ops.dispatch import use_backend
from ncfast.ops.pair_geometry import decision_radius, pair_geometry
from ncfast.statistics import ClassStatistics
from ncfast.theory import simplex_etf
from ncfast.tracker import Tracker

__version__ = "0.1.0"

__all__ = [
    "ClassStatistics",
    "CollapseReport",
    "Tracker",
    "affine_argmax",
    "class_scatter",
    "collapse",
    "decision_radius",
    "measure",
    "measure_model",
    "nearest_class_center",
    "pair_geometry",
    "reference",
    "simplex_etf",
    "use_backend",
]
