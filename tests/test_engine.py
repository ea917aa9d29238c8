"""How drivers connect."""

import pytest

from pipeline import engine


@pytest.mark.parametrize("address", ["10.0.0.7:6379", "head.ray.svc:6379", "[2001:db8::1]:6379"])
def test_a_cluster_that_asks_for_no_token_is_warned_of(address: str) -> None:
    warning = engine._warning_of_an_open_cluster(address, {})
    assert warning is not None
    assert address in warning
    assert "RAY_AUTH_MODE=token" in warning
    assert len(warning.splitlines()) == 1
    assert engine._warning_of_an_open_cluster(address, {"RAY_AUTH_MODE": "disabled"}) == warning
    assert engine._warning_of_an_open_cluster(address, {"RAY_AUTH_MODE": "token"}) is None


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "[::1]:6379", "localhost:6379"])
def test_a_cluster_on_this_machine_alone_is_not(address: str) -> None:
    assert engine._warning_of_an_open_cluster(address, {}) is None
