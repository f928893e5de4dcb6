"""The trainer: runs one job and reports by files, a message and an exit code."""
