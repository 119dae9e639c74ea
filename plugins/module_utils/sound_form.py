# Copyright: the vLLM Fleet authors
# SPDX-License-Identifier: Apache-2.0
"""A sound that is made on the spot, and the form that it is sent in: the question to a model that transcribes."""

from __future__ import annotations

import array
import io
import math
import secrets
import wave
from collections.abc import Mapping
from typing import Any


def half_a_second() -> bytes:
    """A sound: half a second of a quiet tone, as a WAV file of 16 kHz."""
    rate = 16000
    tone = array.array("h", (round(1000 * math.sin(2 * math.pi * 440 * n / rate)) for n in range(rate // 2)))
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(tone.tobytes())
    return data.getvalue()


def form(fields: Mapping[str, Any], sound: bytes) -> tuple[bytes, str]:
    """A form (multipart/form-data) with a sound as its file, and its content type."""
    boundary = secrets.token_hex(16)
    head = f"--{boundary}\r\nContent-Disposition: form-data; name="
    parts = [f'{head}"{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    file = f'{head}"file"; filename="half_a_second.wav"\r\nContent-Type: audio/wav\r\n\r\n'.encode()
    return b"".join(
        [*parts, file, sound, f"\r\n--{boundary}--\r\n".encode()]
    ), f"multipart/form-data; boundary={boundary}"
