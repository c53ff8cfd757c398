"""Bars of progress: `report.py` has the callbacks within programs, `display.py` draws where the programs run."""
