"""The test run itself: no connection leaves this machine, local servers still answer."""

from __future__ import annotations

import os
import socket

import pytest
import requests

from conftest import NetworkBlocked


def test_a_connection_to_another_machine_is_refused() -> None:
    # 192.0.2.0/24 is reserved for documentation (RFC 5737): no machine has this address.
    with socket.socket() as sock, pytest.raises(NetworkBlocked, match="192.0.2.1"):
        sock.connect(("192.0.2.1", 80))


def test_a_name_is_not_looked_up() -> None:
    with pytest.raises(NetworkBlocked, match="example.invalid"):
        socket.getaddrinfo("example.invalid", 80)


def test_a_client_that_honours_proxies_is_stopped() -> None:
    with pytest.raises(requests.ConnectionError):
        requests.get("http://192.0.2.1/", timeout=5)


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_the_hub_is_offline_and_no_photos_of_the_user_are_found() -> None:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    assert HF_HUB_OFFLINE
    assert "BKSDM_DATA" not in os.environ
