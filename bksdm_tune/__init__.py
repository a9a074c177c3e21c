"""Personalise compressed Stable Diffusion."""

__version__ = "0.1.0"
