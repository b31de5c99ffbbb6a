"""The trained demo checkpoint and the script that made it."""
