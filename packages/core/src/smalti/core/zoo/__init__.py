"""Published models; each YAML file in this folder is the table of one system, see `smalti.core.checkpoints.zoo`."""
