"""Files for other tools: adapters ported, merged, resized, exported."""
