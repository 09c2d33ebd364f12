"""Who can reach the engine: key files, certificates, and the address that it listens on.

All are checked before anything slow begins. No message shows a key.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping
from pathlib import Path

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import ConfigError

__all__ = ["API_KEY_VARIABLE", "check_certificate", "open_door_warning", "read_api_keys"]

API_KEY_VARIABLE = "TOKASAURUS_API_KEY"


def read_api_keys(config: EngineConfig, environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """Collects the keys of the flag, the file and the environment variable.

    Args:
        config: the user's choices.
        environment: its variable holds one key, or several separated by commas.

    Returns:
        The keys, or None if no key is needed.

    Raises:
        ConfigError: the file cannot be read, or a given source holds no key. To continue without
            one would leave an engine open that the user meant to protect.
    """
    keys = list(config.api_key or ())
    if config.api_key is not None and not keys:
        raise ConfigError("api_key is an empty list; leave it out where no key is needed")
    if config.api_key_file is not None:
        keys += _keys_of_file(config.api_key_file)
    variable = environment.get(API_KEY_VARIABLE)
    if variable is not None:
        found = [key.strip() for key in variable.split(",") if key.strip()]
        if not found:
            raise ConfigError(f"the environment variable {API_KEY_VARIABLE} is set and empty")
        keys += found
    return tuple(keys) or None


def _keys_of_file(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"api_key_file={path}: not ASCII text") from None
    except OSError as error:
        raise ConfigError(f"api_key_file={path}: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"api_key_file={path} holds no key")
    return keys


def check_certificate(config: EngineConfig) -> None:
    """Loads the certificate and key of HTTPS, as the web server will.

    Raises:
        ConfigError: a file cannot be read or has other contents, or the two do not match.
    """
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return  # resolution reports that only one of them is set
    for flag in ("ssl_certfile", "ssl_keyfile"):
        path = getattr(config, flag)
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{flag}={path}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    names = f"ssl_certfile={config.ssl_certfile} ssl_keyfile={config.ssl_keyfile}"
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=_no_password)
    except ssl.SSLError as error:
        reason = error.reason or "not a PEM file of that kind"
        raise ConfigError(f"{names}: {reason.lower().replace('_', ' ')}") from None


def _no_password() -> str:
    """Called for a key with a password, which no user is there to type."""
    raise ConfigError("ssl_keyfile is protected by a password; give a key without one")


def open_door_warning(config: EngineConfig, address: str) -> str | None:
    """A warning if other machines can use the engine without a key; otherwise None.

    Args:
        config: the user's choices, with all keys.
        address: the IP address that the engine listens on.
    """
    if config.api_key is not None or ipaddress.ip_address(address).is_loopback:
        return None
    return (
        f"host={config.host} lets other machines in, and anyone who reaches port {config.port} may"
        f" use the engine: set api_key_file or {API_KEY_VARIABLE}, or leave host at its default"
    )
