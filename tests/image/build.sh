#!/usr/bin/env bash
# Builds the image from the Dockerfile where no registry of images can be reached, and unpacks it:
#
#   tests/image/build.sh DIRECTORY [BUILD-ARGUMENT=VALUE...]
#
# gives DIRECTORY/rootfs, the image's file system with its owners and modes, and DIRECTORY/config.json, its
# configuration as Docker keeps it. Both bases are made here, of the Debian release that the Dockerfile names: the
# builder by debootstrap, the runtime from the packages that the real one consists of, unpacked and nothing run.
# A second call with the same DIRECTORY reuses them.
#
# pip runs on this machine, with its own configuration; the build itself gets the files, and a pip.conf as its
# secret that says where they are. Needs root, buildah and debootstrap. Exit code 77: cannot be done here, and why.
set -euo pipefail

skip() { echo "no image can be built here: $*" >&2; exit 77; }

target=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

[ "$(id -u)" = 0 ] || skip "debootstrap and buildah need root"
for tool in buildah debootstrap; do
    command -v "$tool" >/dev/null || skip "$tool is not installed"
done

default() { sed -n "s/^ARG $1=//p" Dockerfile; }
builder=$(default BUILDER)
runtime=$(default RUNTIME)
release=${builder##*-}
python=$(sed -n 's/.*python:\([0-9.]*\)-.*/\1/p' <<<"$builder")
[ -e "/usr/share/debootstrap/scripts/$release" ] || skip "this debootstrap does not know Debian $release"

# Where this machine has its packages from, if that is Debian; else debootstrap's own default.
mirror=
if grep -q '^ID=debian' /etc/os-release; then
    mirror=$(sed -n -E 's/^(deb|URIs:)( \[[^]]*\])? +(https?:[^ ]*).*/\3/p' /etc/apt/sources.list \
        /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -n 1 || true)
fi

# Beside Python itself: what the real runtime has under it.
packages="base-files ca-certificates libc6 libcom-err2 libcrypt1 libdb5.3t64 libexpat1 libffi8 libgcc-s1 libgomp1
    libgssapi-krb5-2 libbz2-1.0 libk5crypto3 libkeyutils1 libkrb5-3 libkrb5support0 liblzma5 libncursesw6 libnsl2
    libpython$python-minimal libpython$python-stdlib libreadline8t64 libsqlite3-0 libssl3t64 libstdc++6 libtinfo6
    libtirpc3t64 libuuid1 libzstd1 media-types netbase openssl-provider-legacy python$python-minimal tzdata zlib1g"

make_bases() {
    rm -rf "$target/bases"
    mkdir -p "$target/bases/runtime"
    # No mirror is no argument.
    # shellcheck disable=SC2086
    debootstrap --variant=minbase --include="python3,python3-venv,$(tr -s ' \n' ',,' <<<"$packages" | sed 's/,$//')" \
        "$release" "$target/bases/builder" $mirror >"$target/debootstrap.log" 2>&1 || {
        tail -n 3 "$target/debootstrap.log" >&2
        skip "debootstrap could not make Debian $release"
    }
    local name
    for name in $packages; do
        # Their names carry versions, and an epoch as %3a.
        dpkg-deb --extract "$target"/bases/builder/var/cache/apt/archives/"${name}"_*.deb "$target/bases/runtime"
    done
    ln -sf "python$python" "$target/bases/runtime/usr/bin/python3"
    rm -rf "$target"/bases/runtime/usr/share/{doc,man,locale,lintian}
    cp "$target/bases/builder/etc/ssl/certs/ca-certificates.crt" "$target/bases/runtime/etc/ssl/certs/"
    echo 'root:x:0:0:root:/root:/sbin/nologin' >"$target/bases/runtime/etc/passwd"
    echo 'root:x:0:' >"$target/bases/runtime/etc/group"
    rm -rf "$target"/bases/builder/{var/cache/apt,var/lib/apt/lists,usr/share/{doc,man,locale}}
    touch "$target/bases/.made"
}

storage=$(mktemp -d)
leave() {
    buildah "${store[@]}" rm --all >/dev/null 2>&1 || true
    umount "$storage/root/overlay" 2>/dev/null || true
    rm -rf "$storage"
}
trap leave EXIT
store=(--root "$storage/root" --runroot "$storage/run" --storage-driver overlay)
buildah "${store[@]}" from --quiet scratch >/dev/null 2>&1 || {
    store[5]=vfs
    buildah "${store[@]}" from --quiet scratch >/dev/null 2>"$storage/why" ||
        skip "buildah does not work: $(tail -n 1 "$storage/why")"
}

[ -e "$target/bases/.made" ] || make_bases

import() {  # name, directory
    local container
    container=$(buildah "${store[@]}" from --quiet scratch)
    buildah "${store[@]}" add --quiet "$container" "$2" / >/dev/null
    buildah "${store[@]}" commit --quiet "$container" "$1" >/dev/null
}
import "$builder" "$target/bases/builder"
import "$runtime" "$target/bases/runtime"

case $(uname -m) in
    x86_64 | aarch64) platform=manylinux ;;
    *) skip "no wheels for $(uname -m)" ;;
esac
extra=""
arguments=()
for argument; do
    arguments+=(--build-arg "$argument")
    [[ $argument != EXTRA=* ]] || extra=-${argument#EXTRA=}
done
mkdir -p "$target/wheels"
for requirements in image/requirements-build.txt "image/requirements${extra%-}.txt"; do
    python3 -m pip download --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary=:all: \
        --python-version "$python" --platform "${platform}2014_$(uname -m)" --platform "${platform}_2_28_$(uname -m)" \
        --dest "$target/wheels" -r "$requirements" >"$target/pip.log" 2>&1 || {
        tail -n 3 "$target/pip.log" >&2
        skip "pip could not fetch the wheels"
    }
done
printf '[global]\nno-index = true\nfind-links = /srv\n' >"$target/pip.conf"

# Isolation by chroot asks nothing of cgroups and needs no runtime beside buildah. --format docker: with a HEALTHCHECK.
buildah "${store[@]}" build --quiet --format docker --isolation chroot --pull-never \
    --secret id=pip_conf,src="$target/pip.conf" --volume "$target/wheels:/srv:ro" \
    "${arguments[@]}" --tag image . >/dev/null

container=$(buildah "${store[@]}" from --quiet --pull-never localhost/image)
buildah "${store[@]}" inspect --type image localhost/image |
    python3 -c 'import json, sys; json.dump(json.load(sys.stdin)["Docker"]["config"], sys.stdout)' >"$target/config.json"
rm -rf "$target/rootfs"
mkdir "$target/rootfs"
cp -a "$(buildah "${store[@]}" mount "$container")"/. "$target/rootfs/"
