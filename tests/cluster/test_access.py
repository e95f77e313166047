"""Who is spoken to, and what leaves the process: tokens, refusals, credentials in URLs."""

from __future__ import annotations

import os
import pickle
import socket
import stat
import sys
from pathlib import Path

import psutil
import pytest
from support import run_command

from vae_dist.config.credentials import without_credentials, without_hidden
from vae_dist.config.load import dump_yaml, load_config
from vae_dist.errors import DataError, MachineError
from vae_dist.launch import cluster
from vae_dist.launch.access import own_token, require_token
from vae_dist.launch.network import interface_of, use_node_interface


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    "address", ["10.0.0.1:6379", "head:6379", "ray://10.0.0.1:10001", "[2001:db8::1]:6379", "auto"]
)
def test_no_cluster_beyond_loopback_without_a_token(address: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="RAY_AUTH_MODE=token"):
        require_token(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    # Nothing must be sent: were it, Ray would wait for an answer.
    monkeypatch.setattr(cluster.ray, "init", lambda **options: pytest.fail("connected"))
    with pytest.raises(MachineError, match="not on loopback"):
        cluster.connect()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    require_token(address)


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "ray://127.3.2.1:1", "[::1]:6379"])
def test_loopback_needs_none(address: str) -> None:
    require_token(address)


def test_a_token_that_others_can_read_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    (home / "token").write_text("x")
    (home / "token").chmod(0o640)
    for check in (lambda: require_token("127.0.0.1:1"), own_token):
        with pytest.raises(MachineError, match="chmod 600"):
            check()
    (home / "token").chmod(0o600)
    require_token("127.0.0.1:1")
    own_token()


def test_a_cluster_started_here_has_a_private_token(home: Path) -> None:
    old = os.umask(0o022)
    try:
        own_token()
    finally:
        os.umask(old)
    path = home / ".ray/auth_token"
    assert mode(path) == 0o600 and len(path.read_text()) == 64
    first = path.read_text()
    path.chmod(0o644)
    own_token()
    assert mode(path) == 0o600 and path.read_text() == first


def test_ray_uses_that_token(home: Path) -> None:
    code = "import os, ray, sys; from vae_dist.launch.cluster import connect; connect(); "
    code += "print(os.environ['RAY_AUTH_MODE'], ray.get(ray.remote(lambda: 7).remote()))"
    old = os.umask(0o022)
    try:
        done = run_command([sys.executable, "-c", code], timeout=100)
    finally:
        os.umask(old)
    assert done.out == "token 7\n", done.err
    assert mode(home / ".ray/auth_token") == 0o600 and mode(home / ".ray") & 0o022 == 0


def test_no_token_is_made_where_none_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    own_token()
    assert not (home / ".ray").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:pa%2Fss@bucket/a", "s3://***@bucket/a"),
        ("read hdfs://me@host:9000/x and file:///y@z", "read hdfs://***@host:9000/x and file:///y@z"),
        ("https://h/x?a=1&X-Amz-Signature=abc&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("abfs://h/x?sig=abc%3D", "abfs://h/x?sig=***"),
        ("s3://AKIA:pa/ss:wo@bucket/a", "s3://***@bucket/a"),
        ("http://h:9000/a@b and s3://h:1?x=a@b", "http://h:9000/a@b and s3://h:1?x=a@b"),
        ("s3://bucket/a?scheme=http&region=us-east-1", "s3://bucket/a?scheme=http&region=us-east-1"),
        ("a@b and /path/with@sign: 'x'", "a@b and /path/with@sign: 'x'"),
    ],
)
def test_credentials_of_urls_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert without_credentials(shown) == shown
    assert "@bucket" not in without_hidden(shown), "what is hidden is looked for in the environment"


def test_errors_and_configurations_are_without_credentials() -> None:
    error = DataError("There is nothing at s3://key:hunter2@bucket/x.")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert "hunter2" not in str(one) + one.message + repr(one)
    config = load_config(None, ["data.source=s3://key:hunter2@bucket/x", "data.mixture={'s3://k:hunter2@b/y': 1.0}"])
    assert "hunter2" not in dump_yaml(config) and "bucket/x" in dump_yaml(config)
    with pytest.raises(Exception) as caught:
        load_config(None, ["run.storage=s3://key:hunter2@bucket/x", "data.sauce=s3://key:hunter2@bucket/x"])
    assert "hunter2" not in str(caught.value)


def test_a_worker_uses_the_interface_of_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET:
                assert interface_of(one.address) == name
    assert interface_of("127.0.0.1") == interface_of("127.0.1.1") == "lo"
    with pytest.raises(MachineError, match=r"bears 192\.0\.2\.1.*lo"):
        interface_of("192.0.2.1")
    monkeypatch.setattr(cluster.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    use_node_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine" and os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    # Set by the code, not by the fixture: it must not stay.
    del os.environ["NCCL_SOCKET_IFNAME"]
