"""The private formats of MLflow, against the release that is installed."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

from tracked_sweep import Sweep

from orchestration.tracking import mlflow_private
from orchestration.tracking.mlflow_private import experiment_tags, file_tags, image_names, is_table, table


def test_the_formats_were_read_from_the_installed_release() -> None:
    assert version("mlflow").startswith("3.17.")
    assert "MLflow 3.17 " in (mlflow_private.__doc__ or "")


def test_limits() -> None:
    from mlflow.utils import validation

    assert mlflow_private.LONGEST_BATCH == validation.MAX_METRICS_PER_BATCH
    assert mlflow_private.PARAMS_PER_BATCH == validation.MAX_PARAMS_TAGS_PER_BATCH
    assert mlflow_private.LONGEST_PARAM == validation.MAX_PARAM_VAL_LENGTH
    assert mlflow_private.LONGEST_TAG <= validation.MAX_TAG_VAL_LENGTH
    assert mlflow_private.LONGEST_DIGEST == validation.MAX_DATASET_DIGEST_SIZE


def test_tags() -> None:
    from mlflow.utils import mlflow_tags

    assert mlflow_private.NOTE == mlflow_tags.MLFLOW_RUN_NOTE
    assert mlflow_private.PARENT_RUN == mlflow_tags.MLFLOW_PARENT_RUN_ID
    assert mlflow_private.DATA_CONTEXT == mlflow_tags.MLFLOW_DATASET_CONTEXT
    names = {mlflow_tags.MLFLOW_EXPERIMENT_PRIMARY_METRIC_NAME, mlflow_tags.MLFLOW_EXPERIMENT_PRIMARY_METRIC_GREATER_IS_BETTER}
    assert names < experiment_tags("val/miou").keys()


def test_images_and_tables_are_those_of_the_client(mlflow_database: Path, tmp_path: Path) -> None:
    from mlflow import Image

    database = tmp_path / "mlflow.db"
    database.write_bytes(mlflow_database.read_bytes())
    client = Sweep(f"sqlite:///{database}").client
    experiment = client.create_experiment("demo", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_image(run, Image([[[1.0, 0.0, 0.0]]]), key="predictions", step=4, timestamp=17, synchronous=True)
    client.log_table(run, {"a": [1], "b": [2.5]}, "t.json")
    theirs = sorted(info.path for info in client.list_artifacts(run, "images"))
    unique = re.sub(r".*\+(.*)\.png", r"\1", next(name for name in theirs if name.endswith(".png")))
    assert theirs == sorted(image_names("predictions", step=4, time_ms=17, unique=unique))
    written = Path(client.download_artifacts(run, "t.json")).read_bytes()
    assert is_table(written)
    assert json.loads(written) == json.loads(table(["a", "b"], [[1, 2.5]]))
    tags = client.get_run(run).data.tags
    ours = file_tags([*theirs, "t.json"], tables=["t.json"])
    assert json.loads(tags["mlflow.loggedArtifacts"]) == json.loads(ours["mlflow.loggedArtifacts"])
    assert tags["mlflow.loggedImages"] == ours["mlflow.loggedImages"]
