"""Whole blocks of a decode step in one launch each."""
