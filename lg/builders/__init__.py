"""Builds objects from the config: the only place that translates keys to keyword arguments."""

from lg.builders.data import (
    build_mixing,
    build_test_data,
    build_test_loader,
    build_train_data,
    build_train_loader,
    dataset_facts,
    fetch_data,
)
from lg.builders.guides import build_teacher, load_teacher, model_name, prepare_bank
from lg.builders.models import build_guided, build_model
from lg.builders.preprocessing import (
    build_pixel_format,
    build_preprocessing,
    guide_preprocessing,
    range_note,
    with_data_statistics,
    with_trained_statistics,
)
from lg.builders.run import build_run, place_model
from lg.builders.splits import data_notes
from lg.builders.training import (
    build_average,
    build_device,
    build_learning_rate,
    build_optimizer,
    build_precision,
    build_resources,
    build_schedule,
    check_training,
    check_world,
    fetch_weights,
    synchronize_batch_norms,
)
