"""The benchmark: every subject on every backbone by every method, trained, drawn and scored."""
