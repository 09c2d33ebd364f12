"""Who can reach the engine: key files, certificates, and the address that it listens on.

All are checked before anything slow begins. No message shows a key.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import ssl
from collections.abc import Mapping
from pathlib import Path

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import ConfigError

__all__ = [
    "ADMIN_KEY_VARIABLE",
    "API_KEY_VARIABLE",
    "check_certificate",
    "open_door_warning",
    "with_keys",
]

API_KEY_VARIABLE = "TOKASAURUS_API_KEY"
ADMIN_KEY_VARIABLE = "TOKASAURUS_ADMIN_API_KEY"


def with_keys(config: EngineConfig, environment: Mapping[str, str]) -> EngineConfig:
    """A configuration whose keys are those of the flags, the files and the environment variables.

    Args:
        config: the user's choices.
        environment: each of its two variables holds one key, or several separated by commas.

    Raises:
        ConfigError: a file cannot be read, or a given source holds no key. To continue without one
            would leave an engine open that the user meant to protect.
    """
    return dataclasses.replace(
        config,
        api_key=_read_keys(config, "api_key", environment, API_KEY_VARIABLE),
        admin_api_key=_read_keys(config, "admin_api_key", environment, ADMIN_KEY_VARIABLE),
    )


def _read_keys(
    config: EngineConfig, flag: str, environment: Mapping[str, str], variable: str
) -> tuple[str, ...] | None:
    """The keys of all sources, or None if no source is given."""
    given: tuple[str, ...] | None = getattr(config, flag)
    file: str | None = getattr(config, f"{flag}_file")
    keys = list(given or ())
    if given is not None and not keys:
        raise ConfigError(f"{flag} is an empty list; leave it out where no key is needed")
    if file is not None:
        keys += _keys_of_file(f"{flag}_file", file)
    text = environment.get(variable)
    if text is not None:
        found = [key.strip() for key in text.split(",") if key.strip()]
        if not found:
            raise ConfigError(f"the environment variable {variable} is set and empty")
        keys += found
    return tuple(keys) or None


def _keys_of_file(flag: str, path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{flag}={path}: not ASCII text") from None
    except OSError as error:
        raise ConfigError(f"{flag}={path}: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"{flag}={path} holds no key")
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
