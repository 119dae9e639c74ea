#!/bin/sh
# A repository with the layout, the package names, versions, dependencies and conflicts of download.docker.com, signed by a key made here.
# What stands in for what: docker-ce, docker-ce-cli and containerd.io hold the programs and units of Debian's docker.io, docker-cli, containerd and
# runc, so the engine that they bring is a real one, though not of the version that it says; the two plugins are empty packages.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -y -q --no-install-recommends apt-utils gnupg
apt-get clean
architecture=$(dpkg --print-architecture)
keys=/srv/docker
repository=$keys/debian
release=$repository/dists/trixie
mkdir -p "$repository/pool" "$release/stable/binary-$architecture" /tmp/build
cd /tmp/build
# apt fetches as a user of its own
chmod 777 .
apt-get download -q docker.io docker-cli containerd runc
for package in docker.io docker-cli containerd runc; do
  dpkg-deb -R "${package}"_*.deb "$package"
done
# One package holds containerd and runc, without Debian's relations between the two.
cp -a runc/usr containerd/

# Which packages of those that a Debian package depends on come by another name here, or not at all.
outside() {
  dpkg-deb -f "$1"_*.deb Depends | tr ',' '\n' | grep -vE '^ *(containerd|runc|docker[.a-z-]*)\b' | paste -sd, | sed 's/^ *//'
}

# directory, name, version, depends, conflicts
build() {
  {
    printf 'Package: %s\nVersion: %s\nArchitecture: %s\nMaintainer: test\n' "$2" "$3" "$architecture"
    printf 'Description: stand-in for the package of that name from download.docker.com\n'
    if [ -n "$4" ]; then printf 'Depends: %s\n' "$4"; fi
    if [ -n "$5" ]; then printf 'Conflicts: %s\nReplaces: %s\n' "$5" "$5"; fi
  } >"$1/DEBIAN/control"
  dpkg-deb --root-owner-group -Znone -b "$1" "$repository/pool/$2_${3#*:}_$architecture.deb" >/dev/null
}

tail='1~debian.13~trixie'
for version in 28.5.2 29.1.3; do
  build docker.io docker-ce "5:$version-$tail" "$(outside docker.io), containerd.io (>= 1.7.27), docker-ce-cli" \
    'docker.io'
  build docker-cli docker-ce-cli "5:$version-$tail" "$(outside docker-cli)" 'docker-cli'
done
build containerd containerd.io "1.7.29-$tail" "$(outside containerd), $(outside runc)" 'containerd, runc'
for plugin in docker-buildx-plugin docker-compose-plugin; do
  mkdir -p "$plugin/DEBIAN"
  build "$plugin" "$plugin" "5.0.0-$tail" '' "$(echo $plugin | sed 's/-plugin//')"
done

cd "$repository"
apt-ftparchive packages pool >"$release/stable/binary-$architecture/Packages"
apt-ftparchive -o APT::FTPArchive::Release::Origin=Docker -o APT::FTPArchive::Release::Suite=trixie \
  -o APT::FTPArchive::Release::Codename=trixie -o APT::FTPArchive::Release::Components=stable \
  -o "APT::FTPArchive::Release::Architectures=$architecture" release "$release" >/tmp/Release
mv /tmp/Release "$release/Release"
export GNUPGHOME=/root/keys
mkdir -p -m 0700 "$GNUPGHOME"
gpg --batch --quiet --passphrase '' --quick-gen-key 'stand-in for Docker <docker@example.com>' ed25519 default never
gpg --batch --quiet --passphrase '' --quick-gen-key 'somebody else <else@example.com>' ed25519 default never
gpg --batch --yes --local-user docker@example.com --clearsign --output "$release/InRelease" "$release/Release"
gpg --armor --export docker@example.com >"$keys/gpg"
gpg --armor --export else@example.com >"$keys/other-key"
gpg --with-colons --list-keys docker@example.com | awk -F: '/^fpr/ {print $10; exit}' >"$keys/fingerprint"
rm -r /tmp/build
