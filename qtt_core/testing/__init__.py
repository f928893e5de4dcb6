"""Fakes and contract tests that ship with the package: a fake passes what the real one passes."""
