"""Orders the certificate by certbot, renews it in time, and puts it in place: vllm-fleet-certificate.service runs this.

What it is told is in one file, written by the role tls_certificate. The pair that is in use is a directory whose name says what was ordered
and what is in it; one rename switches to another. Nothing here removes an account or its key.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("fullchain.pem", "privkey.pem")
SYSTEM_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
KEPT = 3  # pairs, the current one among them
# How certbot tells what a certificate authority had against a name.
REFUSED = re.compile(r"^ *(?:Identifier|Domain): *(.+)\n *Type: *(.+)\n *Detail: *(.+)$", re.MULTILINE)
UNEXPECTED = re.compile(r"^An unexpected error occurred:\n(.+)$", re.MULTILINE)
NOISE = re.compile(r"^(Saving debug log|Ask for help|Some challenges have failed|Hint:|Please see the logfile)")


class CertificateError(Exception):
    """Why there is no new certificate, in one line."""


def reason_of(output: str) -> str:
    """What certbot printed, in one line."""
    if refused := REFUSED.findall(output):
        return "; ".join(f"{name.strip()}: {detail.strip()} ({kind.strip()})" for name, kind, detail in refused)
    if unexpected := UNEXPECTED.search(output):
        return unexpected[1].strip()
    lines = [line.strip() for line in output.splitlines() if line.strip() and not NOISE.match(line)]
    return " ".join(lines[-2:]) or "certbot said nothing"


def asked(name: str) -> list[str]:
    """How certbot is told a name, or an address."""
    with contextlib.suppress(ValueError):
        return ["--ip-address", str(ipaddress.ip_address(name))]
    return ["--domain", name]


def authorities(settings: dict[str, Any]) -> str:
    """The file of those whom to trust: the system's, and the one of a private directory."""
    if not settings["authority"]:
        return SYSTEM_AUTHORITIES
    bundle = Path(settings["state"], "authorities.pem")
    bundle.write_text("".join(Path(part).read_text() for part in (SYSTEM_AUTHORITIES, settings["authority"])))
    return str(bundle)


def certbot(settings: dict[str, Any], *options: str) -> None:
    """Call certbot; its options are in a file, since secrets are among them."""
    names = [word for name in settings["names"] for word in asked(name)]
    done = subprocess.run(
        [settings["certbot"], "certonly", "--config", settings["options"], *names, *options],
        env={**os.environ, "REQUESTS_CA_BUNDLE": authorities(settings)},
        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise CertificateError(reason_of(done.stdout))


def order(settings: dict[str, Any]) -> None:
    """Have certbot order a certificate when what was ordered last is not what is wanted, and otherwise renew it when it is time to."""
    current = Path(settings["directory"], "current")
    if current.is_symlink() and current.readlink().name.startswith(settings["pair"]):
        certbot(settings)
        return
    if settings["staging_directory"]:
        try:
            certbot(settings, "--dry-run", "--server", settings["staging_directory"])
        except CertificateError as problem:
            raise CertificateError(f"the dry run at {settings['staging_directory']} failed: {problem}") from None
    certbot(settings, "--force-renewal")


def link(path: Path, target: str) -> None:
    """Make a link, or have it lead elsewhere, by one rename."""
    if path.is_symlink() and str(path.readlink()) == target:
        return
    aside = path.with_name(f".{path.name}.new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.rename(path)


def write_pair(directory: Path, texts: dict[str, str]) -> None:
    """Write a pair, whole or not at all. One that somebody changed is written again."""
    with contextlib.suppress(OSError):
        if all((directory / name).read_text() == text for name, text in texts.items()):
            return
    aside = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, text in texts.items():
        mode = 0o600 if name == "privkey.pem" else 0o644
        with os.fdopen(os.open(aside / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


def switch(settings: dict[str, Any], pair: str) -> None:
    """Make a pair the current one, and remove the oldest of those that were."""
    directory = Path(settings["directory"])
    link(directory / "current", f"pairs/{pair}")
    for name in NAMES:
        link(directory / name, f"current/{name}")
    former = [path for path in (directory / "pairs").glob("acme-*") if path.name != pair]
    for path in sorted(former, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT - 1 :]:
        shutil.rmtree(path)


def put_in_place(settings: dict[str, Any]) -> str:
    """Switch to what certbot has. Returns the name of the pair."""
    live = Path(settings["lineage"])
    texts = {name: (live / name).read_text() for name in NAMES}
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:16]
    pair = f"{settings['pair']}{digest}"
    write_pair(Path(settings["directory"], "pairs", pair), texts)
    switch(settings, pair)
    return pair


def reload(settings: dict[str, Any], pair: str) -> None:
    """Have the services that run read the pair, once. One that failed to is asked again the next time."""
    record = Path(settings["state"], "reloaded")
    if record.exists() and record.read_text() == pair:
        return
    for unit in settings["reload_units"]:
        if subprocess.run(["systemctl", "--quiet", "is-active", unit], check=False).returncode:
            continue
        done = subprocess.run(["systemctl", "reload", unit], text=True, capture_output=True, check=False)
        if done.returncode:
            raise CertificateError(
                f"the new certificate is in place, but {unit} was not reloaded: {done.stderr.strip()}"
            )
    record.write_text(pair)


def first(settings: dict[str, Any]) -> None:
    """Where there is no certificate at all, one that signs itself, so that the service which answers the challenges starts."""
    directory = Path(settings["directory"])
    if (directory / "current").exists():
        return
    alternatives = ",".join(
        f"{'IP' if asked(name)[0] == '--ip-address' else 'DNS'}:{name}" for name in settings["names"]
    )
    key = openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    request = ["req", "-x509", "-key", "/dev/stdin", "-days", "30", "-subj", "/CN=No certificate yet"]
    certificate = openssl(*request, "-addext", f"subjectAltName={alternatives}", given=key)
    write_pair(directory / "pairs/first", {"fullchain.pem": certificate, "privkey.pem": key})
    switch(settings, "first")


def openssl(*arguments: str, given: str = "") -> str:
    """What openssl prints."""
    return subprocess.run(["openssl", *arguments], text=True, capture_output=True, check=True, input=given).stdout


def renew(settings: dict[str, Any]) -> None:
    """All of it. What came of it is left in a file, for the role."""
    reason = ""
    outcome = Path(settings["state"], "outcome.json")
    outcome.unlink(missing_ok=True)
    try:
        order(settings)
        reload(settings, put_in_place(settings))
    except (CertificateError, OSError) as problem:
        reason = str(problem).rstrip(".")
    outcome.write_text(json.dumps({"time": time.time(), "reason": reason}) + "\n")
    if reason:
        raise SystemExit(f"no certificate for {', '.join(settings['names'])}: {reason}")


def main() -> None:
    """certificate.py SETTINGS: order or renew. certificate.py SETTINGS first: see there."""
    os.umask(0o022)
    settings = json.loads(Path(sys.argv[1]).read_text())
    if sys.argv[2:] == ["first"]:
        first(settings)
    else:
        renew(settings)


if __name__ == "__main__":
    main()
