"""What a sweep says: its settings, a fitted law, the best for a budget, and whether one strategy beats another.

Reads the tables `runs` and `curves` (docs/analysis.md). Imports no torch; scipy, pyarrow and plotly, of the extra
`analysis`, where they are used.
"""

from himoe.analysis.budget import Budget
from himoe.analysis.fitting import fit
from himoe.analysis.law import Law
from himoe.analysis.page import write_page
from himoe.analysis.paired import Verdict, compare, verdict
from himoe.analysis.recommend import Recommendation, recommend
from himoe.analysis.runs import Sweep, compare_at, read_sweep, where
from himoe.analysis.settings import Mean, Setting, settings_of
from himoe.analysis.study import Study, study

__all__ = [
    "Budget",
    "Law",
    "Mean",
    "Recommendation",
    "Setting",
    "Study",
    "Sweep",
    "Verdict",
    "compare",
    "compare_at",
    "fit",
    "read_sweep",
    "recommend",
    "settings_of",
    "study",
    "verdict",
    "where",
    "write_page",
]
