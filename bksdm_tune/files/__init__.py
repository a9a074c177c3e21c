"""Adapter and checkpoint files of every tool: read, checked, converted, ported, exported."""
