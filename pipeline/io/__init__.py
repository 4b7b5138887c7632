"""Files, digests, memory, bars, and where Python looks for modules: what every other folder may import."""
