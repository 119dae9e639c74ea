# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Users and passwords in addresses: where they are, and how messages do without them."""

from __future__ import annotations

import re
import urllib.parse
from typing import Any

# A user without a password is a token.
ADDRESS_PASSWORD = re.compile(r"[a-z][a-z+.-]*://(?:[^/\s@:]*:)?([^/\s]*)@")


def without_credentials(url: str) -> str:
    """The address as it may be shown."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def passwords(*texts: str) -> set[str]:
    """The passwords of all addresses in the texts, as they are written and as they are meant."""
    found = {password for text in texts for password in ADDRESS_PASSWORD.findall(text) if password}
    return found | {urllib.parse.unquote(password) for password in found}


def hide_passwords(module: Any, *texts: str) -> None:
    """Keep the passwords of addresses out of all that a module says.

    With no_log the whole address would be missing from the messages that an operator needs; only the password is secret.
    """
    module.no_log_values |= passwords(*texts)


def only_passwords(module: Any, *values: str) -> None:
    """Keep the passwords in values of a no_log option out of all that a module says, and not the values: no_log is for the journal."""
    module.no_log_values -= set(values)
    hide_passwords(module, *values)


def hidden(message: str, *texts: str) -> str:
    """A message without the passwords of the texts' addresses, for modules that have no no_log_values."""
    for password in sorted(passwords(*texts), key=len, reverse=True):
        message = message.replace(password, "********")
    return message
