"""Tests of checkpoints in and out."""
