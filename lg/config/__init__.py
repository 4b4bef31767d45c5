"""The config: every key with its default, the rules for values, and loading."""

from lg.config.defaults import flatten, is_guided
from lg.config.load import (
    changed_keys,
    dump_config,
    load_config,
    load_trained_config,
    stored_config,
    with_values,
)
