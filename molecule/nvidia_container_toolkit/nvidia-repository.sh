#!/bin/sh
# There is no GPU here, and NVIDIA's repositories are out of reach. What stands in for what:
# - the driver: /usr/bin/nvidia-smi prints what /srv/gpus holds, in the words of the real one. Whoever writes that file changes the GPUs.
# - a GPU: /dev/nvidia0 and so on are /dev/full under another name. It is harmless, and it can be told from a file: what is written to it does not
#   fit. Every container may use /dev/full itself, so what the kernel allows is no proof; that the node is there under its other name is one.
# - nvidia.github.io (http://127.0.0.1:8081) and NVIDIA's repository for CUDA (http://localhost:8082, with a newer version of the same packages):
#   packages with the real names, versions and dependencies. nvidia-ctk in them knows `cdi list` and `cdi generate` only. nvidia-cdi-refresh is made
#   of the conditions of the real units.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get install -y -q --no-install-recommends apt-utils gnupg
architecture=$(dpkg --print-architecture)
mkdir -p "/srv/nvidia/deb/$architecture" /srv/cuda /srv/keys /tmp/build/base/DEBIAN /tmp/build/base/usr/bin /tmp/build/base/usr/lib/systemd/system
cd /tmp/build

cat >/srv/gpus <<'GPUS'
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-aaaa-0000-0000-000000000000)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-aaaa-0000-0000-000000000000)
GPUS
cat >/usr/bin/nvidia-smi <<'SMI'
#!/bin/sh
case "$1" in
  -L) cat /srv/gpus ;;
  *) sed -n 's/^GPU \([0-9]*\): \(.*\) (UUID.*/\1, \2, 81559, 9.0, 580.159.04/p' /srv/gpus ;;
esac
SMI
chmod 755 /usr/bin/nvidia-smi
mkdir -p /usr/lib/nvidia
echo 'stands in for a library of the driver' >/usr/lib/nvidia/libcuda.so.580.159.04

cat >base/usr/bin/nvidia-ctk <<'CTK'
#!/usr/bin/python3
"""The two commands of nvidia-ctk that are needed here."""

import glob
import os
import re
import sys

if sys.argv[1:3] == ["cdi", "list"]:
    names = []
    for path in glob.glob("/etc/cdi/*.yaml") + glob.glob("/var/run/cdi/*.yaml"):
        text = open(path).read()
        if "kind: nvidia.com/gpu" in text:
            names += re.findall(r'^ *- name: "?([^"\n]+)', text, re.MULTILINE)
    print(f'time="now" level=info msg="Found {len(names)} CDI devices"', file=sys.stderr)
    print("".join(f"nvidia.com/gpu={name}\n" for name in names), end="")
    sys.exit()
assert sys.argv[1:3] == ["cdi", "generate"], sys.argv
output = os.environ.get("NVIDIA_CTK_CDI_OUTPUT_FILE_PATH", "/dev/stdout")
for argument in sys.argv[3:]:
    output = argument.removeprefix("--output=")
devices = []
for line in open("/srv/gpus"):
    kind, uuid = re.search(r"(GPU|MIG) .*UUID: ([^)]+)", line).groups()
    if kind == "GPU":
        devices.append([uuid])
    else:
        devices[-1].append(uuid)
named = []
for index, (gpu, *parts) in enumerate(devices):
    node = f"/dev/nvidia{index}"
    for number, part in enumerate(parts):
        named += [(f"{index}:{number}", [node]), (part, [node])]
    if not parts:
        named += [(str(index), [node]), (gpu, [node])]
named.append(("all", [f"/dev/nvidia{index}" for index in range(len(devices))]))
lines = ["---", "cdiVersion: 0.7.0", "kind: nvidia.com/gpu", "devices:"]
for name, nodes in named:
    lines += [f'    - name: "{name}"', "      containerEdits:", "        deviceNodes:"]
    for node in nodes:
        lines += [f"            - path: {node}", "              hostPath: /dev/full"]
lines += ["containerEdits:", "    env:", "        - NVIDIA_VISIBLE_DEVICES=void", "    mounts:"]
for path in ("/usr/bin/nvidia-smi", "/srv/gpus", *glob.glob("/usr/lib/nvidia/*")):
    lines += [f"        - hostPath: {path}", f"          containerPath: {path}", "          options: [ro, nosuid, nodev, rbind, rprivate]"]
os.makedirs(os.path.dirname(output), exist_ok=True)
with open(output, "w") as file:
    file.write("\n".join([*lines, ""]))
CTK
chmod 755 base/usr/bin/nvidia-ctk
cat >base/usr/lib/systemd/system/nvidia-cdi-refresh.service <<'UNIT'
[Unit]
Description=Refresh NVIDIA CDI specification file
ConditionPathExists=|/usr/bin/nvidia-smi
ConditionPathExists=|/usr/sbin/nvidia-smi
ConditionPathExists=/usr/bin/nvidia-ctk
After=multi-user.target
[Service]
Type=oneshot
Environment=NVIDIA_CTK_CDI_OUTPUT_FILE_PATH=/var/run/cdi/nvidia.yaml
ExecCondition=/usr/bin/grep -qE '/(nvidia|nvidia-current)\\.ko' /lib/modules/%v/modules.dep
ExecStart=/usr/bin/nvidia-ctk cdi generate
RemainAfterExit=yes
[Install]
WantedBy=multi-user.target
UNIT
cat >base/usr/lib/systemd/system/nvidia-cdi-refresh.path <<'UNIT'
[Unit]
Description=Trigger CDI refresh on NVIDIA driver install / uninstall events
[Path]
PathChanged=/lib/modules/%v/modules.dep
PathChanged=/lib/modules/%v/modules.dep.bin
[Install]
WantedBy=multi-user.target
UNIT

# directory of the repository, name, version, depends, directory of the content
build() {
  mkdir -p "$5/DEBIAN"
  {
    printf 'Package: %s\nVersion: %s\nArchitecture: %s\nMaintainer: test\n' "$2" "$3" "$architecture"
    printf 'Description: stand-in for the package of that name from NVIDIA\n'
    if [ -n "$4" ]; then printf 'Depends: %s\n' "$4"; fi
  } >"$5/DEBIAN/control"
  dpkg-deb --root-owner-group -Znone -b "$5" "$1/$2_$3_$architecture.deb" >/dev/null
}

toolkit() {
  build "$1" libnvidia-container1 "$2" '' empty
  build "$1" libnvidia-container-tools "$2" "libnvidia-container1 (= $2)" empty
  build "$1" nvidia-container-toolkit-base "$2" '' base
  build "$1" nvidia-container-toolkit "$2" "nvidia-container-toolkit-base (= $2), libnvidia-container-tools (= $2)" empty
}

repository=/srv/nvidia/deb/$architecture
for version in 1.17.8-1 1.20.0-1 1.21.0-1; do
  toolkit "$repository" "$version"
done
toolkit /srv/cuda 1.22.0-1

export GNUPGHOME=/root/keys
mkdir -p -m 0700 "$GNUPGHOME"
gpg --batch --quiet --passphrase '' --quick-gen-key 'stand-in for NVIDIA <nvidia@example.com>' ed25519 default never
gpg --batch --quiet --passphrase '' --quick-gen-key 'somebody else <else@example.com>' ed25519 default never
gpg --armor --export nvidia@example.com >/srv/nvidia/gpgkey
gpg --armor --export else@example.com >/srv/keys/other
for directory in "$repository" /srv/cuda; do
  cd "$directory"
  apt-ftparchive packages . >Packages
  apt-ftparchive release . >/tmp/Release
  mv /tmp/Release Release
  gpg --batch --yes --local-user nvidia@example.com --clearsign --output InRelease Release
done
printf 'Types: deb\nURIs: http://localhost:8082/\nSuites: /\nSigned-By: /srv/nvidia/gpgkey\n' >/etc/apt/sources.list.d/cuda.sources

ln -s /srv/nvidia /srv/8081
ln -s /srv/cuda /srv/8082
cat >/etc/systemd/system/repository@.service <<'UNIT'
[Service]
DynamicUser=yes
WorkingDirectory=/srv/%i
ExecStart=/usr/bin/python3 -m http.server --bind 127.0.0.1 %i
[Install]
WantedBy=multi-user.target
UNIT
# What the role must not have done to Docker shows against this.
systemctl show docker --property=InvocationID --value >/srv/engine
sha256sum /etc/docker/daemon.json >/srv/daemon.sha256
gpg --with-colons --list-keys nvidia@example.com | awk -F: '/^fpr/ {print $10; exit}' >/srv/nvidia/fingerprint
rm -r /tmp/build
