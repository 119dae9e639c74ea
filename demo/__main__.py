"""The throw-away fleet of `make demo`: test hosts, and site.yml run on them over real SSH.

    python -m demo up       from nothing to a chat completion over HTTPS; again: changes nothing
    python -m demo hosts    only starts the hosts, bare, and builds the model: for `site.yml --check` and the like
    python -m demo down     removes all of it
    python -m demo model    only builds the small models and prints the directory of the one that completes

DEMO_HOSTS   number of inference hosts (default 1)
DEMO_PORT    port on 127.0.0.1 where the endpoint is published (default 8443)
DEMO_FLEET   name of the fleet (default demo); the end-to-end tests run one of their own
DEMO_OS      operating system of the inference hosts (default debian12), or one for each, with commas between them
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

from tests.hosts import hosts

ROOT = Path(__file__).resolve().parents[1]
FLEET = os.environ.get("DEMO_FLEET", "demo")
DIRECTORY = ROOT / (".demo" if FLEET == "demo" else f".cache/{FLEET}")
PORT = int(os.environ.get("DEMO_PORT", "8443"))
MODEL = "smollm2-135m-instruct"
MODEL_DIRECTORY = ROOT / ".cache/models" / MODEL
# The second model, for embeddings: nothing to download. Its weights are random, so its numbers mean nothing; it is there to be routed to.
EMBEDDING = "tiny-embedding"
EMBEDDING_DIRECTORY = ROOT / ".cache/models/tiny/embed"
STARTED = time.monotonic()


def say(text: str) -> None:
    """Print one line of progress."""
    seconds = int(time.monotonic() - STARTED)
    print(f"[{seconds // 60}:{seconds % 60:02}] {text}", flush=True)


def build_model() -> Path:
    """Build the Hugging Face directories of the small models, once for each clone. Returns that of the one that completes."""
    with hosts.locked("model"):
        if not EMBEDDING_DIRECTORY.is_dir():
            hosts.run(
                sys.executable, "-m", "tests.tiny_models", str(EMBEDDING_DIRECTORY.parent), EMBEDDING_DIRECTORY.name,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/.collections"},
            )  # fmt: skip
        if MODEL_DIRECTORY.is_dir():
            return MODEL_DIRECTORY
        uv, environment = ROOT / ".venv/bin/uv", ROOT / ".cache/model-venv"
        variables = {**os.environ, "UV_SYSTEM_CERTS": "1"}
        find_links = os.environ.get("PIP_FIND_LINKS", "")
        source = ["--find-links", find_links] if find_links else ["--torch-backend", "cpu"]
        hosts.run(str(uv), "venv", "--quiet", "--clear", "--python", "3.11", str(environment), env=variables)
        lock = str(ROOT / "demo/requirements-model.lock")
        hosts.run(
            str(uv), "pip", "sync", "-q", "-p", str(environment), "--require-hashes", *source, lock, env=variables
        )
        MODEL_DIRECTORY.parent.mkdir(parents=True, exist_ok=True)
        hosts.run(f"{environment}/bin/python", str(ROOT / "demo/build_model.py"), str(MODEL_DIRECTORY))
        shutil.rmtree(environment)
    return MODEL_DIRECTORY


def secret(name: str) -> str:
    """A secret of this demo, made once."""
    file = DIRECTORY / name
    if not file.exists():
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(descriptor, secrets.token_hex(32).encode())
        os.close(descriptor)
    return file.read_text()


def start_hosts(count: int) -> dict[str, str]:
    """Start the hosts and write what SSH and the inventory need to know of them. Returns name -> address."""
    gateway, workers = f"{FLEET}-gateway", [f"{FLEET}-gpu{number}" for number in range(1, count + 1)]
    systems = os.environ.get("DEMO_OS", "debian12").split(",")
    wanted = {gateway: "debian12", **dict(zip(workers, cycle(systems), strict=False))}
    hosts.up(FLEET, wanted, [f"{gateway}:{PORT}:443"], DIRECTORY)
    addresses = {name: hosts.address(name) for name in wanted}
    fleet = {"gateway": {gateway: addresses[gateway]}, "vllm": {name: addresses[name] for name in workers}}
    (DIRECTORY / "controller").write_text(hosts.controller(FLEET))
    (DIRECTORY / "fleet.json").write_text(json.dumps(fleet, indent=2) + "\n")
    return addresses


def playbook(*arguments: str) -> str:
    """Run ansible-playbook with the demo's inventory, one line for each play. Returns the recap."""
    command = [str(ROOT / ".venv/bin/ansible-playbook"), "-i", "inventories/demo", *arguments]
    environment = {
        **os.environ,
        "DEMO_DIR": str(DIRECTORY),
        "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "true",
        "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
    }
    log_file = DIRECTORY / "site.log"
    output = []
    with log_file.open("w") as log, subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            log.write(line)
            output.append(line)
            if found := re.match(r"PLAY \[(.+)\] \*", line):
                say(f"{found[1]} ...")
            elif found := re.match(r"TASK \[.* : (.+(?:minutes\)|every clone\)))\] \*", line):
                say(f"  {found[1].split(' | ')[-1]}")
    text = "".join(output)
    recap = text[text.rfind("PLAY RECAP") :].strip()
    if process.returncode:
        print("".join(output[-60:]))
        raise hosts.HostsError(f"{shlex.join(command)} ended with {process.returncode}; its whole output is {log_file}")
    return recap


def ask(access: dict[str, object], path: str, body: dict[str, object]) -> dict[str, object]:
    """Ask the endpoint as any client would, and return its answer."""
    request = urllib.request.Request(
        f"{access['base_url']}{path}",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {access['api_key']}", "Content-Type": "application/json"},
    )
    context = ssl.create_default_context(cafile=str(access["ca_file"]))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(request, timeout=120) as response:
        answer: dict[str, object] = json.load(response)
    return answer


def ask_both(access: dict[str, object], question: str) -> None:
    """Ask one model a question and the other for an embedding of it, at the same address."""
    message = {"role": "user", "content": question}
    say(f"asking {MODEL}: {question}")
    chat: Any = ask(
        access, "/chat/completions", {"model": MODEL, "messages": [message], "max_tokens": 32, "temperature": 0}
    )
    say(f"answer: {chat['choices'][0]['message']['content']}")
    embedded: Any = ask(access, "/embeddings", {"model": EMBEDDING, "input": question})
    say(f"{EMBEDDING}, at the same address: {len(embedded['data'][0]['embedding'])} numbers for the question")


def prepare() -> dict[str, str]:
    """What site.yml needs: hosts, a model, secrets. Returns name -> address."""
    count = int(os.environ.get("DEMO_HOSTS", "1"))
    say(f"starting 1 gateway and {count} inference host(s) as systemd containers, and building the model ...")
    with ThreadPoolExecutor() as pool:
        model = pool.submit(build_model)
        addresses = start_hosts(count)
        model.result()
    secret("api_key")
    secret("internal_key")
    return addresses


def up() -> None:
    """From nothing to an answer."""
    addresses = prepare()
    api_key = secret("api_key")
    recap = playbook("site.yml")
    access: dict[str, object] = {
        "base_url": f"https://localhost:{PORT}/v1",
        "ca_file": str(DIRECTORY / "ca.pem"),
        "api_key": api_key,
        "model": MODEL,
        "models": [MODEL, EMBEDDING],
        "hosts": addresses,
    }
    (DIRECTORY / "ca.pem").write_text(
        hosts.docker("exec", f"{FLEET}-gateway", "cat", "/etc/ssl/vllm-fleet/ca.pem") + "\n"
    )
    access_file = DIRECTORY / "access.json"
    access_file.touch(mode=0o600)
    access_file.write_text(json.dumps(access, indent=2) + "\n")
    print(recap)
    question = "What is the capital of France?"
    ask_both(access, question)
    print(f"""
The service is up. Ask it yourself:

curl --cacert {access["ca_file"]} {access["base_url"]}/chat/completions \\
  -H "Authorization: Bearer {api_key}" -H "Content-Type: application/json" \\
  -d '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "{question}"}}]}}'

or with Python (pip install openai):

import openai, ssl
client = openai.OpenAI(base_url="{access["base_url"]}", api_key="{api_key}",
                       http_client=openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile="{access["ca_file"]}")))
answer = client.chat.completions.create(model="{MODEL}", messages=[{{"role": "user", "content": "{question}"}}])
print(answer.choices[0].message.content)
other = client.embeddings.create(model="{EMBEDDING}", input="{question}")
print(len(other.data[0].embedding), "numbers by", other.model)

Next: look into a host with `ssh -F {DIRECTORY / "config"} {FLEET}-gpu1` (sudo journalctl -u vllm@chat), change inventories/demo
and run `make demo` again, read docs/quickstart.md, and remove it all with `make demo-down`.""")


def down() -> None:
    """Remove the fleet and its secrets; what was downloaded or built stays in .cache."""
    hosts.down(FLEET)
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    hosts.engine_stop()


def print_model() -> None:
    """Tell where the model is."""
    print(build_model())


def main() -> int:
    """Do what the command line says."""
    commands = {"up": up, "hosts": prepare, "down": down, "model": print_model}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print(__doc__)
        return 2
    try:
        commands[sys.argv[1]]()
    except hosts.HostsError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
