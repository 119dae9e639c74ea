"""A server that streams tokens 10 ms apart and says in each when it was sent: stands in for vLLM where its own pace would
drown what the gateway adds. Runs on a host's python3: token_stream.py PORT TOKENS"""

import asyncio
import sys
import time

PORT, TOKENS = int(sys.argv[1]), int(sys.argv[2])
PACE = 0.01
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer every request of a connection with a stream."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
            await reader.readexactly(length)
            writer.write(HEAD)
            due = time.monotonic()
            for _ in range(TOKENS):
                event = f'data: {{"sent": {time.monotonic():.6f}, "text": " token"}}\n\n'.encode()
                writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                await writer.drain()
                due += PACE
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            writer.write(b"0\r\n\r\n")
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        writer.close()


async def main() -> None:
    """Serve until killed."""
    server = await asyncio.start_server(serve, "0.0.0.0", PORT)  # noqa: S104 - a test host on a network of its own
    await server.serve_forever()


asyncio.run(main())
