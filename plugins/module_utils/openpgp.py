# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""The fingerprints of the keys in a file. Hosts need not have gpg: a fingerprint is only a hash (RFC 4880, 4.2 and 12.2).

apt trusts every key of a file that it is given, so each of them has to be one that was expected.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator

ARMOR = re.compile(
    rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(?:[\w-]+: [^\n]*\n)*\r?\n(.*?)-----END PGP PUBLIC KEY BLOCK-----",
    re.DOTALL,
)
PUBLIC_KEY = 6
# Parts of a public key: it, its subkeys, user ids and attributes, signatures, trust, markers and padding.
KNOWN = {2, 6, 10, 12, 13, 14, 17, 21}


class KeyFileError(Exception):
    """What is wrong with a file of keys."""


def binary(data: bytes) -> bytes:
    """The keys without the ASCII armour."""
    blocks = ARMOR.findall(data)
    if not blocks:
        if b"-----BEGIN" in data or not data or not data[0] & 0x80:
            raise KeyFileError("it holds no OpenPGP public key")
        return data
    if ARMOR.sub(b"", data).strip():
        raise KeyFileError("it holds something beside keys")
    found = b""
    for block in blocks:
        # the last line, with an equals sign in front, is a checksum
        lines = [line.strip() for line in block.splitlines()]
        text = b"".join(line for line in lines if not line.startswith(b"="))
        try:
            found += base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise KeyFileError("its ASCII armour is broken") from error
    return found


def number(data: bytes, at: int, size: int) -> int:
    """A number of so many bytes."""
    if at + size > len(data):
        raise KeyFileError("it ends too early")
    return int.from_bytes(data[at : at + size], "big")


def packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The packets of keys: kind and content."""
    at = 0
    while at < len(data):
        head = data[at]
        if not head & 0x80:
            raise KeyFileError("it is no sequence of OpenPGP packets")
        if head & 0x40:  # the new format
            kind, first = head & 0x3F, number(data, at + 1, 1)
            if first < 192:
                size, start = first, at + 2
            elif first < 224:
                size, start = (first - 192) * 256 + number(data, at + 2, 1) + 192, at + 3
            elif first == 255:
                size, start = number(data, at + 2, 4), at + 6
            else:
                raise KeyFileError("a packet has no length")
        else:
            kind, width = head >> 2 & 0x0F, {0: 1, 1: 2, 2: 4}.get(head & 3, 0)
            if not width:
                raise KeyFileError("a packet has no length")
            size, start = number(data, at + 1, width), at + 1 + width
        if start + size > len(data):
            raise KeyFileError("it ends too early")
        if kind not in KNOWN:
            raise KeyFileError(f"it holds something that is no part of a public key (packet {kind})")
        yield kind, data[start : start + size]
        at = start + size


def fingerprints(data: bytes) -> list[str]:
    """The fingerprints of all keys in a file, armoured or not; those of their subkeys are not asked for."""
    found = []
    for kind, content in packets(binary(data)):
        if kind != PUBLIC_KEY:
            continue
        if content[:1] != b"\x04":
            raise KeyFileError(
                f"it has a key of version {content[0] if content else 0}, and only version 4 is known here"
            )
        hashed = b"\x99" + len(content).to_bytes(2, "big") + content
        found.append(hashlib.sha1(hashed, usedforsecurity=False).hexdigest().upper())
    if not found:
        raise KeyFileError("it holds no OpenPGP public key")
    return found


def problem(data: bytes, expected: list[str]) -> str:
    """Why a file must not be trusted, empty when it may."""
    try:
        found = fingerprints(data)
    except KeyFileError as error:
        return str(error)
    wanted = {fingerprint.replace(" ", "").upper() for fingerprint in expected}
    foreign = [fingerprint for fingerprint in found if fingerprint not in wanted]
    return f"it holds the key {foreign[0]}, and {', '.join(sorted(wanted))} was expected" if foreign else ""
