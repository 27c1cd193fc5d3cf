"""The server of the tests; it is shared with those of wan-train."""

from wan_model.testing.object_store import (
    ACCESS_KEY,
    SECRET_KEY,
    Fault,
    Proxy,
    environment,
    free_port,
    object_server,
    write_profile,
)

__all__ = ["ACCESS_KEY", "SECRET_KEY", "Fault", "Proxy", "environment", "free_port", "object_server", "write_profile"]
