"""How text is read: `sources.py` first, then `folders.py`, `formats.py`, `tables.py`, and what these lean on.

That is `columns.py` and `cutting.py`; `embedded.py` is the text that every Python has.
"""

from himoe.data.text.embedded import embedded_source
from himoe.data.text.sources import Source, Unit, read_source, read_sources

__all__ = ["Source", "Unit", "embedded_source", "read_source", "read_sources"]
