"""What is said of a cluster that cannot be joined, and of a node on which the store cannot be read."""

import errno
import pickle

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")  # before the modules that import it

import ray

from wan_data.prepare.on_ray import actor_pool, cluster
from wan_data.storage.failures import UnusableCredentialsError, UnusableStoreError


@pytest.mark.parametrize(
    ("address", "mode", "said"),
    [
        ("head:6379", None, True),
        ("head:6379", "disabled", False),
        ("auto", None, False),
    ],
)
def test_tokens_are_named_where_ray_sends_none(monkeypatch, address, mode, said):
    def refuse(*arguments, **more):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(cluster, "check_address", lambda address: None)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with (
        pytest.raises(ValueError, match=f"there is no Ray cluster at {address}") as error,
        cluster._connected(address, None),
    ):
        pass
    assert ("--ray-address auto, or with RAY_AUTH_MODE=token" in str(error.value)) == said


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_in_the_virtual_environment_is_refused(monkeypatch, tmp_path, name):
    # Where Ray would be waited for forever.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *arguments, **more: pytest.fail("it is started"))
    monkeypatch.setenv(name, str(tmp_path / "tmp"))
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    with pytest.raises(ValueError, match=f"{name} is .*; set it to another folder"), cluster._connected(None, None):
        pass


@pytest.mark.parametrize(
    ("raised", "of_the_node"),
    [
        (UnusableCredentialsError(errno.EACCES, "no credentials for s3://b were found", "s3://b/a.mp4"), True),
        (UnusableStoreError("s3://b needs boto3, which is not installed"), True),
        (FileNotFoundError(errno.ENOENT, "it does not exist", "s3://b/a.mp4"), False),
        (ValueError("frames is 10"), False),
    ],
)
def test_a_node_that_cannot_read_the_store_is_named(monkeypatch, raised, of_the_node):
    def get(reference):
        cause = pickle.loads(pickle.dumps(raised))  # as between processes
        raise ray.exceptions.RayTaskError("probe", "a traceback", cause, proctitle="x", pid=1, ip="10.0.0.7")

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(type(raised)) as error:
        actor_pool._result("a reference")
    found = str(getattr(error.value, "strerror", None) or error.value)
    assert found.startswith(str(getattr(raised, "strerror", None) or raised))
    assert ("on the node 10.0.0.7 of the Ray cluster" in found) == of_the_node
    assert getattr(error.value, "filename", None) == getattr(raised, "filename", None)
