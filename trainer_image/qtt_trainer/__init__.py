"""The trainer: runs one job (steps of one configuration in a row) and reports by files and exit code."""
