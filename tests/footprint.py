"""What there is on a host, so that two looks at it can be compared: files, packages, users, units, kernel settings and firewall rules.

What the system itself changes all the time is left out by name, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable

# Run on the host as root.
PROGRAM = r"""
import hashlib, json, os, stat, subprocess
found = {}
def look(path):
    seen = os.lstat(path)
    what = oct(seen.st_mode) + " " + str(seen.st_uid) + ":" + str(seen.st_gid)
    if stat.S_ISLNK(seen.st_mode):
        what += " " + os.readlink(path)
    elif stat.S_ISREG(seen.st_mode):
        what += " " + hashlib.sha256(open(path, "rb").read()).hexdigest()[:12]
    found[path] = what
for top in TOPS:
    for folder, folders, names in os.walk(top):
        for name in folders + names:
            look(os.path.join(folder, name))
def lines(kind, *command):
    for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
        found[kind + " " + line.strip()] = ""
lines("package", "dpkg-query", "--show", "--showformat=${db:Status-Abbrev} ${Package} ${Version}\n")
lines("hold", "apt-mark", "showhold")
lines("user", "getent", "passwd")
lines("group", "getent", "group")
lines("unit", "systemctl", "list-unit-files", "--no-legend", "--plain", "--no-pager")
lines("running", "sh", "-c", "systemctl list-units --no-legend --plain --no-pager --type=service,timer,socket,path | awk '{print $1}'")
lines("setting", "sysctl", "-a")
lines("rule", "sh", "-c", "nft list ruleset")
print(json.dumps(found))
"""
TOPS = ["/etc", "/opt", "/usr/local", "/var/lib", "/var/cache", "/var/log", "/var/spool", "/srv", "/home", "/root"]
# Counters, dates and memories of the system: kernel, dpkg, systemd, ld.so. Users are compared by themselves.
RESTLESS = re.compile(
    r"setting (fs\.(dentry|inode|file|aio|quota)|kernel\.(random|ns_last_pid|pty|perf)|net\.(netfilter\.nf_conntrack_count|ipv4\.\w*mem|ipv6\.conf))"
    r"|/var/lib/dpkg/|/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$|/etc/\.pwd\.lock$|/etc/ld\.so\.cache$|/var/cache/ldconfig"
    r"|/var/lib/systemd/(random-seed|timers|timesync|catalog)|/var/lib/private$"
    r"|running (user@|session|systemd-(timedated|hostnamed|tmpfiles)|apt-|dpkg-)"
)


def of(run: Callable[[str], str]) -> dict[str, str]:
    """What there is. `run` runs a shell command as root, and says what it printed."""
    program = PROGRAM.replace("TOPS", json.dumps(TOPS))
    found: dict[str, str] = json.loads(
        run(f"cat >/tmp/look.py <<'EOF'\n{program}\nEOF\npython3 -B /tmp/look.py; rm /tmp/look.py")
    )
    return {name: what for name, what in found.items() if not RESTLESS.match(name)}


def differences(before: dict[str, str], after: dict[str, str], left: Iterable[str] = ()) -> list[str]:
    """What is there now and was not, or is gone, or is another one, without what lies in the places that are `left`."""
    found = []
    places = tuple(left)
    for name in sorted({*before, *after}):
        if before.get(name) == after.get(name):
            continue
        # nor the directories that lead to them
        if any(f"{name}/".startswith(f"{place}/") or place.startswith(f"{name}/") for place in places):
            continue
        found.append(f"{'+' if name not in before else '-' if name not in after else '~'} {name}")
    return found
