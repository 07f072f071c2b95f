"""Model families, one small file each: a config.json read as a DecoderSpec, and the names of the weights."""
