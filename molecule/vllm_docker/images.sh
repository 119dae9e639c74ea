#!/bin/sh
# Makes the images of the scenario, with no registry but the one on this host: `docker import` takes a file system as a stream.
#
# /srv/images.json says afterwards what there is, by digest (name) and by the id of the image (name_id):
# - good, next: the stand-in for vLLM (tests/stand_in), which differs by its version only. broken: the same, but it fails when it is started. They are in the registry
#   (127.0.0.1:5000/played, and as name_private behind a password: 127.0.0.1:5001/played). good is on the host as well, as played:good, but
#   without a digest; the others have to be pulled.
# - archived: in no registry and not on the host, but in /srv/archived.tar.
# - real: on the host and in no registry. With the argument `real`, the release of the role vllm, at its own path, in the userland of Debian 12
#   that is in /srv/debian12 (a registry would compress its 2 GB); else one more of the stand-in.
set -eu
rm -rf /srv/played
mkdir -p /srv/played

real() {
  release=$(dirname "$(ls -t /opt/vllm/releases/[0-9]*/.complete | head -n 1)")
  mkdir -p /srv/debian12/opt/vllm
  ln -sfn "$release" /srv/debian12/opt/vllm/release
  # One stream, nothing is copied before. A third of it would be Triton, which vLLM does not use on a CPU.
  tar -c --exclude='*/site-packages/triton' --exclude='*/site-packages/triton-*' -C /srv/debian12 . -C / "${release#/}" |
    docker import --change "ENV PATH=$release/bin:/usr/local/bin:/usr/bin:/bin" --change 'ENTRYPOINT ["vllm", "serve"]' - vllm-cpu:real
}
[ "${1:-}" != real ] || real >/srv/real.id &

# A file system for the stand-in: this host's Python with its standard library, a shell, and what one looks around with.
copy() {
  for path; do
    install -D "$path" "/srv/played/usr/${path#/usr/}"
  done
}
libraries() {
  ldd "$@" 2>/dev/null | sed -n 's,^[^/]*\(/[^ ]*\) (0x.*,\1,p' | sort -u | sed 's,^/lib,/usr/lib,'
}
python=$(readlink -f /usr/bin/python3)
stdlib=/usr/lib/${python##*/}
programs="$python $(for name in cat env find grep head id ls mount setpriv sh sleep stat touch true; do readlink -f "/usr/bin/$name"; done | sort -u)"
mkdir -p /srv/played/usr/lib /srv/played/usr/lib64 /srv/played/usr/bin /srv/played/usr/sbin /srv/played/usr/local/bin
for name in bin lib lib64 sbin; do
  ln -s "usr/$name" "/srv/played/$name"
done
for name in dev etc proc run srv sys tmp var/cache; do
  mkdir -p "/srv/played/$name"
done
# shellcheck disable=SC2086 # a list
copy $programs $(libraries $programs "$stdlib"/lib-dynload/*.so)
cp -a "$stdlib" /srv/played/usr/lib/
rm -rf "/srv/played$stdlib"/test "/srv/played$stdlib"/ensurepip "/srv/played$stdlib"/pydoc_data "/srv/played$stdlib"/idlelib
ln -s "${python##*/}" /srv/played/usr/bin/python3
ln -s dash /srv/played/usr/bin/sh
mkdir -p /srv/played/usr/lib/python3/dist-packages
python3 -m zipfile -e /srv/stand-in/vllm-*.whl /srv/played/usr/lib/python3/dist-packages
printf '%s\n' '#!/usr/bin/python3' 'import sys' 'from vllm.entrypoints.cli.main import main' 'sys.exit(main())' >/srv/played/usr/local/bin/vllm
chmod 0755 /srv/played/usr/local/bin/vllm
echo 'root:x:0:0:root:/root:/bin/sh' >/srv/played/etc/passwd
tar -c -C /srv/played -f /srv/played.tar .

played() { # NAME [SETTING]: its id
  settings="{\"version\": \"$1\", \"seconds_per_token\": 0.1${2:+, $2}}"
  docker import --change "ENV STAND_IN='$settings'" --change 'ENV PATH=/usr/local/bin:/usr/bin' \
    --change 'ENTRYPOINT ["vllm", "serve"]' /srv/played.tar "played:$1"
}
good_id=$(played good)
next_id=$(played next)
broken_id=$(played broken '"start_error": "this image is broken"')
archived_id=$(played archived)
[ "${1:-}" = real ] || played real >/srv/real.id
docker save --output /srv/archived.tar played:archived
docker image rm played:archived >/dev/null

for name in good next broken; do
  docker tag "played:$name" "127.0.0.1:5000/played:$name"
  docker push --quiet "127.0.0.1:5000/played:$name" >/dev/null
  docker image inspect --format '{{index .RepoDigests 0}}' "played:$name" >"/srv/$name.digest"
  docker image rm "127.0.0.1:5000/played:$name" >/dev/null
done
docker image rm played:next played:broken >/dev/null

wait
real_id=$(cat /srv/real.id)
cat >/srv/images.json.new <<JSON
{
  "good": "$(cat /srv/good.digest)", "good_private": "$(sed s/:5000/:5001/ /srv/good.digest)", "good_id": "$good_id",
  "next": "$(cat /srv/next.digest)", "next_private": "$(sed s/:5000/:5001/ /srv/next.digest)", "next_id": "$next_id",
  "broken": "$(cat /srv/broken.digest)", "broken_private": "$(sed s/:5000/:5001/ /srv/broken.digest)", "broken_id": "$broken_id",
  "archived_id": "$archived_id",
  "real": "${real_id:?the real image was not made}"
}
JSON
mv /srv/images.json.new /srv/images.json
rm -rf /srv/played /srv/played.tar /srv/*.digest /srv/real.id /srv/debian12
