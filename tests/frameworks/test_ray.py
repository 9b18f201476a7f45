"""layerstore.ray: an import by workers of a local cluster is that of one process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ray = pytest.importorskip("ray")

import layerstore
import layerstore.ray as lr
from layerstore.errors import ConflictError, InvalidInputError, LayerstoreError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
from conftest import FIXTURES

MODEL, CALIBRATION = FIXTURES / "small.safetensors", FIXTURES / "small-calibration.safetensors"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def artifacts(report):
    return {layer["layer"]: layer["artifact"] for layer in report["layers"]}


@pytest.fixture(params=["keys", "int4"])
def rules(request):
    return FIXTURES / f"{request.param}.toml"


def test_rules_are_those_of_the_call(tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text((FIXTURES / "int4.toml").read_text())
    alone = layerstore.create(tmp_path / "alone").import_model(MODEL, "m", rules=rules, calibration=CALIBRATION)

    def told(event):
        if event["event"] == "started":
            rules.write_text("[[rule]]\nlayers = 1\n")

    together = lr.import_model(MODEL, "m", store=tmp_path / "shared", rules=rules, statistics=CALIBRATION, workers=1, progress=told)
    assert artifacts(together) == artifacts(alone)


def test_resources_that_no_node_has_are_told(tmp_path):
    def told(event):
        raise InterruptedError(event["event"])

    for resources in ({"num_cpus": 100}, {"resources": {"big": 1}}):
        with pytest.warns(RuntimeWarning, match="no node of the cluster has"), pytest.raises(InterruptedError):
            lr.import_model(MODEL, "m", store=tmp_path / "shared", resources=resources, progress=told)


def test_a_killed_worker_changes_nothing(tmp_path, rules):
    alone = layerstore.create(tmp_path / "alone").import_model(MODEL, "m", rules=rules, calibration=CALIBRATION)
    killed, seen = [], []

    def told(event):
        seen.append(event)
        if event["event"] == "done" and not killed:
            killed.append(event["worker"])
            os.kill(event["worker"], signal.SIGKILL)

    shared = tmp_path / "shared"
    together = lr.import_model(
        MODEL, "m", store=shared, rules=rules, statistics=CALIBRATION, workers=2, batch_bytes=1, message="by Ray", progress=told
    )
    assert artifacts(together) == artifacts(alone)
    assert killed and len({event["worker"] for event in seen if "worker" in event}) >= 2
    assert [event["event"] for event in (seen[0], seen[-1])] == ["started", "finished"]
    assert seen[-2]["done"] == seen[-2]["total"] == len(together["layers"])
    error = {layer["layer"]: layer["relative_error"] for layer in alone["layers"]}
    assert {layer["layer"]: layer["relative_error"] for layer in together["layers"]} == error
    store = layerstore.open(shared)
    log = store.log()
    # One commit beside the store's own first version.
    assert len(log) == 2 and log[0]["message"] == "by Ray"
    assert store.verify()["sound"]
    store.gc(older_than=0, apply=True)
    assert store.verify()["sound"] and len(store.layers("m")) == len(together["layers"])


def test_what_is_there_is_not_made_again(tmp_path, rules):
    shared = tmp_path / "shared"
    layerstore.create(shared).import_model(MODEL, "a", rules=rules, calibration=CALIBRATION)
    again = lr.import_model(MODEL, "b", store=shared, rules=rules, statistics=CALIBRATION, workers=1)
    assert again["written_bytes"] == 0 and all(layer["reused"] for layer in again["layers"])


@pytest.fixture
def bucket():
    """Storage options that lead to the S3 server of the tests."""
    server = os.environ.get("LAYERSTORE_S3_SERVER")
    if not server:
        pytest.skip("LAYERSTORE_S3_SERVER names no server: make test-frameworks builds it")
    with subprocess.Popen([server, "0"], stdout=subprocess.PIPE, text=True) as process:
        said = dict(process.stdout.readline().strip().split("=", 1) for _ in range(4))
        names = {"AWS_ENDPOINT_URL": "endpoint", "AWS_ACCESS_KEY_ID": "access_key_id", "AWS_SECRET_ACCESS_KEY": "secret_access_key"}
        yield {names.get(name, "region"): value for name, value in said.items()}
        process.kill()


def test_a_killed_worker_changes_nothing_on_s3(tmp_path, rules, bucket):
    alone = layerstore.create(tmp_path / "alone").import_model(MODEL, "m", rules=rules, calibration=CALIBRATION)
    killed = []

    def told(event):
        if event["event"] == "done" and not killed:
            killed.append(event["worker"])
            os.kill(event["worker"], signal.SIGKILL)

    together = lr.import_model(
        MODEL,
        "m",
        store="s3://models/shared",
        storage_options=bucket,
        rules=rules,
        statistics=CALIBRATION,
        workers=2,
        batch_bytes=1,
        progress=told,
    )
    assert killed and artifacts(together) == artifacts(alone)
    store = layerstore.open("s3://models/shared", storage_options=bucket, disk_cache=tmp_path / "copies")
    assert len(store.log()) == 2 and store.verify()["sound"]
    x = np.ones((1, 48), np.float32)
    for _ in range(2):
        here = layerstore.open(tmp_path / "alone").layer("m", "blocks.0.up")(x)
        assert np.array_equal(store.layer("m", "blocks.0.up")(x), here)


def test_errors_are_the_imports(tmp_path):
    with pytest.raises(InvalidInputError, match="memory"):
        lr.import_model(MODEL, "m", store="memory://x")
    for wrong in ({"workers": 0}, {"workers": True}, {"retries": -1}, {"batch_bytes": 0}, {"workers": 1.5}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            lr.import_model(MODEL, "m", store=tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()
    # Found by the driver, before any worker.
    wrong = [{"layers": ".*", "method": "low_rank", "rank": -1}]
    with pytest.raises(InvalidInputError):
        lr.import_model(MODEL, "m", store=tmp_path / "s", rules=wrong)
    assert layerstore.open(tmp_path / "s").models() == []


def test_errors_of_workers_come_through(tmp_path, tensors_with_nan):
    with pytest.raises(InvalidInputError, match="NaN|finite"):
        lr.import_model(tensors_with_nan, "m", store=tmp_path / "s", rules=[{"layers": ".*", "method": "ternary"}])
    assert layerstore.open(tmp_path / "s").models() == []


@pytest.fixture
def tensors_with_nan(tmp_path):
    from safetensors.numpy import save_file

    x = np.ones((8, 8), "f4")
    x[3, 3] = np.nan
    save_file({"a.weight": x}, tmp_path / "nan.safetensors")
    return tmp_path / "nan.safetensors"


def test_workers_that_die_again_and_again(tmp_path):
    def told(event):
        if "worker" in event:
            os.kill(event["worker"], signal.SIGKILL)

    class Dies(lr._Worker):
        def compress(self, layers):
            os.kill(os.getpid(), signal.SIGKILL)

    kept, lr._Worker = lr._Worker, Dies
    try:
        with pytest.raises(LayerstoreError, match="died 2 times"):
            lr.import_model(MODEL, "m", store=tmp_path / "s", workers=1, retries=1)
    finally:
        lr._Worker = kept
    assert layerstore.open(tmp_path / "s").models() == []


def test_gc_waits_for_a_lease(tmp_path):
    store = layerstore.create(tmp_path / "s")
    names = [layer["layer"] for layer in store.plan(MODEL, check_values=False)["layers"]]
    with store.lease() as lease:
        half = store.compress_layers(MODEL, names[::2])
        assert artifacts(half).keys() == set(names[::2]) and store.models() == []
        with pytest.raises(ConflictError):
            layerstore.open(tmp_path / "s").gc(older_than=0, apply=True)
        lease.close()
    report = store.import_model(MODEL, "m")
    assert sum(layer["reused"] for layer in report["layers"]) >= len(names[::2])
    with pytest.raises(InvalidInputError, match="the closest is"):
        store.compress_layers(MODEL, [names[0] + "x"])
