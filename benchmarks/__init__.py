"""Drivers of recorded measurements; results/ holds what they wrote."""
