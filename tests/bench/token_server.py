"""Streams tokens at a steady pace, in the words of vLLM's API: what a GPU does, for measuring what is in front of it.

    token_server.py ADDRESS PORT [SECONDS_BETWEEN_TOKENS]

Runs on the system's Python of a test host, needs nothing installed.
"""

from __future__ import annotations

import asyncio
import json
import sys

ADDRESS, PORT = sys.argv[1], int(sys.argv[2])
PACE = float(sys.argv[3]) if len(sys.argv) > 3 else 0.01
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: str) -> bytes:
    """An event in a chunk of its own, as vLLM sends it."""
    return f"{len(data) + 8:x}\r\ndata: {data}\n\n\r\n".encode()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests on a connection until the client closes it."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        asked = json.loads(await reader.readexactly(int(headers[b"content-length"])))
        event = json.dumps(
            {"object": "text_completion", "model": asked["model"], "choices": [{"index": 0, "text": " a"}]}
        )
        loop = asyncio.get_running_loop()
        begun = loop.time()
        writer.write(HEAD)
        for number in range(asked["max_tokens"]):
            writer.write(chunk(event))
            await asyncio.sleep(max(0.0, begun + PACE * (number + 1) - loop.time()))
        writer.write(chunk("[DONE]") + b"0\r\n\r\n")
        await writer.drain()


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve a connection; its end is no error."""
    try:
        await serve(reader, writer)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    """Serve for ever."""
    async with await asyncio.start_server(handle, ADDRESS, PORT) as server:
        await server.serve_forever()


asyncio.run(main())
