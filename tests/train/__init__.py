"""Tests of recovery and of training from scratch."""
