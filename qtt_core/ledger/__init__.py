"""The run's ledger: events (what is written) and fold (what they add up to)."""
