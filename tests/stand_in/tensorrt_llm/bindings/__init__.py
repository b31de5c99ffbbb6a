"""See `executor.py`."""
