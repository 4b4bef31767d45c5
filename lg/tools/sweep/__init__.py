"""`--mode sweep`: search settings with Optuna, on the images that do not belong to the test set."""

from lg.errors import ConfigError

try:
    import optuna
except ImportError:
    raise ConfigError("--mode sweep needs Optuna: pip install -e '.[sweep]'.") from None
