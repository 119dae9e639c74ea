#!/usr/bin/env python3
"""
Builds, on a test host, what stands in for the vendors and for the hardware. Runs on the host's Python; needs dpkg-deb, and gpg for NVIDIA's key.

    vendors.py archive BASE [VERSION ...]   BASE/ubuntu: the part of Ubuntu's archive that the driver is in, by these versions
    vendors.py nvidia BASE                  BASE/nvidia: NVIDIA's repository, signed, with the package that has its key
    vendors.py hardware BASE GPUS SWITCHES  BASE/hardware: /sys, /proc and /dev of a machine with H100
    vendors.py tools BASE                   modprobe and modinfo that know the stand-in modules

What is real: apt, dpkg, their preferences, pins, holds, conflicts and signatures. What stands in: every package is empty but for a unit, a script
or a text in place of a kernel module. Names, versions, dependencies and conflicts are those of the vendors, as far as they matter here:
- Ubuntu 24.04: packages.ubuntu.com, nvidia-graphics-drivers-580-server and linux-restricted-modules
- NVIDIA: the CUDA repository of ubuntu2404, where names lose their branch from 590 on
nvidia-smi says what the stand-in module that is "loaded" and its own package have as their version, and fails as the real one when they differ.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KERNEL = "6.8.0-88-generic"
ARCHIVE = ("535.309.01", "580.126.09", "580.159.03", "595.71.05")
NVIDIA = ("580.159.03", "590.48.01", "595.71.05")
UBUNTU_MAINTAINER = "Ubuntu Core Developers <ubuntu-devel-discuss@lists.ubuntu.com>"
NVIDIA_MAINTAINER = "cudatools <cudatools@nvidia.com>"
SMI = """#!/bin/sh
loaded=$(cat {base}/hardware/sys/module/nvidia/version 2>/dev/null)
if test -z "$loaded"; then
  echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running."
  exit 9
fi
if test "$loaded" != {version}; then echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18; fi
case "$*" in
  *-x*) sed "s/VERSION/$loaded/" {base}/hardware/nvidia-smi.xml ;;
  *) sed "s/VERSION/$loaded/" {base}/hardware/nvidia-smi.csv ;;
esac
"""
PERSISTENCED = """[Unit]
Description=NVIDIA Persistence Daemon
StopWhenUnneeded=true
[Service]
Type=simple
ExecStart=/usr/bin/nvidia-persistenced --user nvidia-persistenced --no-persistence-mode --verbose
"""
FABRIC = """[Unit]
Description=NVIDIA fabric manager service
[Service]
ExecStart=/bin/sleep infinity
[Install]
WantedBy=multi-user.target
"""
MODPROBE = """#!/bin/sh
# Stands in for modprobe: "loads" the stand-in module of the kernel that the stand-in machine runs.
hardware={base}/hardware
module=/lib/modules/$(cat $hardware/proc/sys/kernel/osrelease)
for name; do :; done
test -n "$name" || exit 1
if test "$1" = -r; then rm -rf $hardware/sys/module/$name $hardware/proc/driver; exit 0; fi
case "$name" in
  nvidia)
    test -d $hardware/sys/module/nvidia && exit 0
    file=$(find $module -name nvidia.ko 2>/dev/null | head -n 1)
    test -n "$file" || { echo "modprobe: FATAL: Module nvidia not found in directory $module" >&2; exit 1; }
    version=$(sed -n 's/^version: *//p' "$file")
    mkdir -p $hardware/sys/module/nvidia $hardware/proc/driver/nvidia
    echo "$version" >$hardware/sys/module/nvidia/version
    echo "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  $version  Release Build  (stand-in)" >$hardware/proc/driver/nvidia/version
    touch $hardware/dev/nvidiactl ;;
  nvidia-uvm) test -d $hardware/sys/module/nvidia && touch $hardware/dev/nvidia-uvm ;;
esac
"""
MODINFO = """#!/bin/sh
# Stands in for `modinfo -k KERNEL nvidia`.
file=$(find /lib/modules/"$2" -name nvidia.ko 2>/dev/null | head -n 1)
test -n "$file" || { echo "modinfo: ERROR: Module nvidia not found." >&2; exit 1; }
echo "filename:       $file"
cat "$file"
"""


class Repository:
    """Packages and the index over them."""

    def __init__(self, base: Path, name: str, maintainer: str) -> None:
        self.base, self.directory, self.maintainer = base, base / name, maintainer
        self.directory.mkdir(parents=True, exist_ok=True)
        self.stanzas = ""

    def add(
        self, name: str, version: str, files: dict[str, str] | None = None, script: str = "", **fields: str
    ) -> None:
        """A package. Fields have _ for -."""
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: {self.maintainer}\n"
        control += "".join(f"{field.replace('_', '-')}: {value}\n" for field, value in fields.items() if value)
        control += "Description: stand-in for a test\n"
        deb = self.directory / f"{name}_{version.rpartition(':')[2]}_all.deb"
        with tempfile.TemporaryDirectory() as temporary:
            tree = Path(temporary)
            tree.chmod(0o755)
            for path, text in {
                "DEBIAN/control": control,
                **({"DEBIAN/postinst": f"#!/bin/sh\n{script}"} if script else {}),
                **(files or {}),
            }.items():
                file = tree / path.lstrip("/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                file.chmod(0o755 if text.startswith("#!") else 0o644)
            subprocess.run(
                ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(deb)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        data = deb.read_bytes()
        self.stanzas += (
            control + f"Filename: ./{deb.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n\n"
        )

    def index(self, origin: str, label: str, suite: str, key: str = "") -> None:
        """Packages and Release, signed with a key if there is one."""
        text = self.stanzas.encode()
        (self.directory / "Packages").write_bytes(text)
        (self.directory / "Packages.gz").write_bytes(gzip.compress(text))
        sums = "".join(
            f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}\n"
            for name in ("Packages", "Packages.gz")
            for data in [(self.directory / name).read_bytes()]
        )
        release = self.directory / "Release"
        names = f"Suite: {suite}\nCodename: {suite}\n" if suite else ""
        release.write_text(f"Origin: {origin}\nLabel: {label}\n{names}Architectures: amd64\nSHA256:\n{sums}")
        if key:
            signed = self.directory / "InRelease"
            signed.unlink(missing_ok=True)
            command = ["gpg", "--homedir", key, "--batch", "--clearsign", "--output", str(signed), str(release)]
            subprocess.run(command, check=True)


def smi_fields(base: Path, version: str) -> dict[str, str]:
    return {"/usr/bin/nvidia-smi": SMI.format(base=base, version=version)}


def module(version: str) -> str:
    """The text that is in place of a kernel module: what modinfo would say of it."""
    return f"version:        {version}\nlicense:        Dual MIT/GPL\nvermagic:       {KERNEL} SMP preempt mod_unload modversions\n"


def archive(base: Path, versions: Sequence[str]) -> None:
    """Ubuntu's archive."""
    made = Repository(base, "ubuntu", UBUNTU_MAINTAINER)
    for number, version in enumerate(versions):
        branch, full = version.partition(".")[0], f"{version}-0ubuntu0.24.04.1"
        server = f"{branch}-server"
        user = "getent passwd nvidia-persistenced >/dev/null || useradd --system --no-create-home --shell /usr/sbin/nologin nvidia-persistenced\n"

        def only(name: str) -> dict[str, Any]:
            """One branch at a time, as the real packages have it: each provides a name that it conflicts with."""
            return {"Provides": name, "Conflicts": name, "Replaces": name}

        made.add(f"nvidia-firmware-{server}-{version}", full)
        made.add(
            f"nvidia-kernel-common-{server}",
            full,
            Depends=f"nvidia-firmware-{server}-{version}",
            **only("nvidia-kernel-common"),
        )
        for name in ("libnvidia-cfg1", "libnvidia-decode", "libnvidia-compute"):
            made.add(f"{name}-{server}", full, **only(name))
        made.add(f"nvidia-compute-utils-{server}", full, script=user, Depends=f"libnvidia-compute-{server}", **only("nvidia-compute-utils"), files={
            "/lib/systemd/system/nvidia-persistenced.service": PERSISTENCED, "/usr/bin/nvidia-persistenced": "#!/bin/sh\nexec sleep infinity\n",
        })  # fmt: skip
        made.add(
            f"nvidia-utils-{server}",
            full,
            smi_fields(base, version),
            Depends=f"libnvidia-compute-{server}",
            **only("nvidia-utils"),
        )
        needs = (
            "libnvidia-cfg1",
            "libnvidia-compute",
            "libnvidia-decode",
            "nvidia-compute-utils",
            "nvidia-kernel-common",
        )
        made.add(
            f"nvidia-headless-no-dkms-{server}-open",
            full,
            Depends=", ".join(f"{name}-{server} (= {full})" for name in needs),
        )
        common = f"nvidia-kernel-common-{server}"
        modules = f"linux-modules-nvidia-{server}-open"
        made.add(
            f"{modules}-{KERNEL}", f"6.8.0-88.89+{number}", {f"/lib/modules/{KERNEL}/kernel/nvidia-{branch}srv-open/nvidia.ko": module(version)},
            Depends=f"{common} (>= {version}), {common} (<= {version}-1)",
        )  # fmt: skip
        made.add(f"{modules}-generic", f"6.8.0-88.89+{number}", Depends=f"{modules}-{KERNEL} (= 6.8.0-88.89+{number})")
        fabric = {"/lib/systemd/system/nvidia-fabricmanager.service": FABRIC}
        made.add(f"nvidia-fabricmanager-{branch}", full, fabric, **only("nvidia-fabricmanager"))
        made.add(f"libnvidia-nscq-{branch}", full, **only("libnvidia-nscq"))
    made.add("nvidia-modprobe", "535.161.07-1")
    made.add("ordinary", f"{len(versions)}.0")  # what an upgrade may touch, newer with each version of the driver
    for name in ("linux-generic", "linux-image-generic", "linux-headers-generic", f"linux-headers-{KERNEL}"):
        made.add(name, "6.8.0-88.89")
    made.index("Ubuntu", "Ubuntu", "noble-updates")


def nvidia(base: Path) -> None:
    """NVIDIA's repository."""
    key = base / "key"
    key.mkdir(mode=0o700, exist_ok=True)
    if not any(key.glob("*.kbx")):
        subprocess.run(
            [
                "gpg",
                "--homedir",
                str(key),
                "--batch",
                "--passphrase",
                "",
                "--quick-gen-key",
                "cudatools",
                "rsa3072",
                "sign",
                "never",
            ],
            check=True,
        )
    public = subprocess.run(["gpg", "--homedir", str(key), "--export"], check=True, capture_output=True).stdout
    made = Repository(base, "nvidia", NVIDIA_MAINTAINER)
    for version in NVIDIA:
        branch = version.partition(".")[0]
        suffix, full = ("", f"{version}-1ubuntu1") if int(branch) >= 590 else (f"-{branch}", f"{version}-0ubuntu1")
        open_ = f"nvidia-dkms{suffix}-open"

        def only(name: str, suffix: str = suffix) -> dict[str, Any]:
            return {"Provides": name, "Conflicts": name, "Replaces": name} if suffix else {}

        made.add(f"libnvidia-compute{suffix}", full, **only("libnvidia-compute"))
        made.add(
            f"nvidia-utils{suffix}",
            full,
            smi_fields(base, version),
            Depends=f"libnvidia-compute{suffix} (= {full})",
            **only("nvidia-utils"),
        )
        made.add(
            open_,
            full,
            {f"/lib/modules/{KERNEL}/updates/dkms/nvidia.ko": module(version)},
            Depends="dkms",
            **only("nvidia-dkms-open"),
        )
        made.add("nvidia-persistenced", full, script="getent passwd nvidia-persistenced >/dev/null || useradd --system nvidia-persistenced\n", files={
            "/lib/systemd/system/nvidia-persistenced.service": PERSISTENCED.replace("StopWhenUnneeded=true\n", "") + "[Install]\nWantedBy=multi-user.target\n",
            "/usr/bin/nvidia-persistenced": "#!/bin/sh\nexec sleep infinity\n",
        })  # fmt: skip
        made.add("nvidia-modprobe", full)
        made.add("nvidia-fabricmanager", full, {"/lib/systemd/system/nvidia-fabricmanager.service": FABRIC})
        made.add("libnvidia-nscq", full)
        pinned = f"Package: *nvidia* cuda-drivers*\nPin: version {branch}.*\nPin-Priority: 1000\n"
        made.add(f"nvidia-driver-pinning-{branch}", f"{branch}-1", {"/etc/apt/preferences.d/nvidia-driver-pinning": pinned},
                 Provides="nvidia-driver-pinning", Conflicts="nvidia-driver-pinning", Replaces="nvidia-driver-pinning")  # fmt: skip
    made.add("dkms", "1:3.2.1-1ubuntu2")
    made.add(
        "cuda-nvcc-13-0",
        "13.0.88-1",
        {"/usr/local/cuda-13.0/bin/nvcc": "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n"},
    )
    for name in (
        "cuda-cudart-dev-13-0",
        "cuda-cccl-13-0",
        "cuda-nvrtc-dev-13-0",
        "libcurand-dev-13-0",
        "libcublas-dev-13-0",
    ):
        made.add(name, "13.0.88-1")
    # The key is binary, and packages here are made of texts: its installer script writes it.
    keyring = "/usr/share/keyrings/cuda-archive-keyring.gpg"
    octets = "".join(f"\\{byte:03o}" for byte in public)
    pin = "Package: *\nPin: release l=NVIDIA CUDA\nPin-Priority: 600\n"
    made.add(
        "cuda-keyring",
        "1.1-1",
        {"/etc/apt/preferences.d/cuda-repository-pin-600": pin},
        script=f"printf '{octets}' >{keyring}\n",
    )
    shutil.copy(made.directory / "cuda-keyring_1.1-1_all.deb", base / "cuda-keyring_1.1-1_all.deb")
    made.index("NVIDIA", "NVIDIA CUDA", "", str(key))


def hardware(base: Path, gpus: int, switches: int) -> None:
    """A machine with H100, and NVSwitches."""
    root = base / "hardware"
    shutil.rmtree(root, ignore_errors=True)
    kinds = [("0x2330", "0x030200")] * gpus + [("0x22a3", "0x068000")] * switches
    texts = {"proc/sys/kernel/osrelease": f"{KERNEL}\n", "dev/placeholder": ""}
    for number, (device, kind) in enumerate(kinds):
        path = f"sys/bus/pci/devices/0000:{number + 16:02x}:00.0"
        texts.update({f"{path}/vendor": "0x10de\n", f"{path}/device": f"{device}\n", f"{path}/class": f"{kind}\n"})
    fabric = "<fabric><state>Completed</state><status>Success</status></fabric>" if switches else ""
    cards = "".join(
        f'<gpu id="00000000:{number + 16:02X}:00.0"><uuid>GPU-{number}</uuid><persistence_mode>Enabled</persistence_mode>{fabric}'
        "<remapped_rows><remapped_row_unc>0</remapped_row_unc><remapped_row_pending>No</remapped_row_pending>"
        "<remapped_row_failure>No</remapped_row_failure></remapped_rows></gpu>"
        for number in range(gpus)
    )
    texts["nvidia-smi.xml"] = f"<nvidia_smi_log><driver_version>VERSION</driver_version>{cards}</nvidia_smi_log>\n"
    texts["nvidia-smi.csv"] = "".join(
        f"{number}, NVIDIA H100 80GB HBM3, 81559, 9.0, VERSION, Disabled\n" for number in range(gpus)
    )
    for path, text in texts.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def tools(base: Path) -> None:
    """Programs that come before the real ones."""
    for name, text in (("modprobe", MODPROBE), ("modinfo", MODINFO)):
        file = Path("/usr/local/sbin") / name
        file.write_text(text.replace("{base}", str(base)))
        file.chmod(0o755)
    Path("/boot").mkdir(exist_ok=True)
    Path(f"/boot/vmlinuz-{KERNEL}").touch()


def main(what: str, base: Path, *more: str) -> None:
    """Build one of them."""
    if what == "archive":
        archive(base, more or ARCHIVE)
    elif what == "nvidia":
        nvidia(base)
    elif what == "hardware":
        hardware(base, int(more[0]), int(more[1]))
    else:
        tools(base)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
