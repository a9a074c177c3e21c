"""Adapter files of every tool in one form, and which U-Net each is for."""
