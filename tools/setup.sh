#!/usr/bin/env bash
# Makes .venv: the Python environment of the controller, pinned with hashes in requirements.lock. Its Python is the newest
# one here, or SETUP_PYTHON=3.11; SETUP_VENV=.cache/other is another directory for it.
# On a fresh Debian or Ubuntu machine it installs what is missing, as root, and says so; as anybody else it says what to
# install. Called by every make target: a second call finds the stamp and is over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${SETUP_VENV:-.venv}
stamp=$venv/.stamp
locks=(tools/uv.txt requirements.lock)
state() { echo "SETUP_PYTHON=${SETUP_PYTHON:-}"; cat "${locks[@]}" tools/setup.sh; }
# A moved or copied clone has a .venv whose programs name the old place: that one is made again.
home() { grep -qsF "$PWD/$venv" "$venv/bin/activate"; }
done_before() { [[ -f $stamp ]] && home && state | cmp -s - "$stamp"; }
done_before && exit 0

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

mkdir -p .cache
exec 9>.cache/setup.lock
flock 9 # targets that run side by side set up once
done_before && exit 0

# The certificate store of the system holds the authorities of the networks that this machine lives in.
export UV_SYSTEM_CERTS=1 UV_LINK_MODE=copy UV_NO_CONFIG=1 PIP_DISABLE_PIP_VERSION_CHECK=1

need() { # need PACKAGE...: install Debian packages
    if ((EUID != 0)); then
        fail "missing: $*. Install them with: sudo apt-get install $*"
    fi
    command -v apt-get >/dev/null || fail "missing: $*, and this is neither Debian nor Ubuntu. Install them and try again."
    say "installing $* ..."
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -q --no-install-recommends "$@" >.cache/setup.log 2>&1 && return
    { apt-get update -q && apt-get install -y -q --no-install-recommends "$@"; } >.cache/setup.log 2>&1 ||
        { tail -n 20 .cache/setup.log >&2; fail "apt-get could not install $*; its whole log is .cache/setup.log"; }
}

can_venv() { python3 -c 'import ensurepip, venv' 2>/dev/null; }
can_venv || need python3 python3-venv
# Ansible needs an SSH client on the controller, git is what molecule looks for its base configuration with.
missing=()
command -v ssh >/dev/null || missing+=(openssh-client)
command -v git >/dev/null || missing+=(git)
[[ -e /etc/ssl/certs/ca-certificates.crt ]] || missing+=(ca-certificates)
# What the gateway's Lua is tested on and checked by.
PATH=$PATH:/sbin ldconfig -p | grep -F libluajit-5.1.so.2 >/dev/null || missing+=(libluajit2-5.1-2)
command -v luacheck >/dev/null || missing+=(lua-check)
((${#missing[@]} == 0)) || need "${missing[@]}"

# uv comes from its wheel, in a small environment of its own.
bootstrap=.cache/bootstrap
if ! { [[ -x $bootstrap/bin/uv ]] && cmp -s tools/uv.txt $bootstrap/uv.txt && grep -qsF "$PWD" $bootstrap/bin/activate; }; then
    say "installing uv ..."
    rm -rf $bootstrap
    python3 -m venv $bootstrap
    $bootstrap/bin/python -m pip install --quiet --require-hashes --only-binary :all: --requirement tools/uv.txt
    cp tools/uv.txt $bootstrap/uv.txt
fi
uv=$PWD/$bootstrap/bin/uv

# ansible-core 2.19 is the last one for Python 3.11; its newest one names these as the Pythons of a controller.
newer=(3.14 3.13 3.12)
probe='import ctypes, ssl, sys; print("%d.%d" % sys.version_info[:2], sys.executable)'
find_python() { # find_python VERSION...: version and path of the first one that is here and runs, which a shim of pyenv may not
    local pyenv=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo ~/.pyenv)} found wanted
    found=$({ type -aP python3 "${@/#/python}"; ls -d {"$("$uv" python dir)","$pyenv/versions"}/*/bin/python3; } 2>/dev/null |
        while read -r python; do "$python" -c "$probe" 2>/dev/null </dev/null; done || true)
    for wanted in "$@"; do
        grep -m 1 "^$wanted " <<<"$found" && return
    done
}

if [[ -n ${SETUP_PYTHON:-} ]]; then
    [[ " ${newer[*]} 3.11 " == *" $SETUP_PYTHON "* ]] || fail "SETUP_PYTHON is $SETUP_PYTHON, but must be one of: ${newer[*]} 3.11"
    read -r version python < <(find_python "$SETUP_PYTHON") || version=$SETUP_PYTHON
else
    read -r version python < <(find_python "${newer[@]}" 3.11) || version=3.13
fi
[[ $version != 3.11 ]] ||
    say "Python 3.11 gets ansible-core 2.19, which has had no fixes since November 2026; with SETUP_PYTHON=3.13 uv fetches a newer one"
if ! home || ! "$venv/bin/python" -V 2>/dev/null | grep -qF "Python $version."; then
    say "making $venv with Python $version$([[ $python ]] || echo ', which uv fetches') ..."
    "$uv" venv --quiet --clear --python "${python:-$version}" "$venv"
fi
say "installing the packages of requirements.lock into $venv ..."
"$uv" pip sync --quiet --require-hashes --python "$venv/bin/python" "${locks[@]}"
state >$stamp
say "done"
