"""The config: loading, every key with its default, and the rules that values must obey."""

from lg.config.load import changed_keys, dump_config, flatten, load_config

__all__ = ["changed_keys", "dump_config", "flatten", "load_config"]
