"""Stages of pocket pre-training; ``scripts/pretrain_pocket.py`` runs them."""
